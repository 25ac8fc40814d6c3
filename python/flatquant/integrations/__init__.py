"""Where flatquant meets other libraries; nothing else in the package knows about them."""
