"use strict";
// Tips under the pointer, by touch, and by the arrow keys in a focused figure.
(() => {
  const tip = document.getElementById("tip");
  let current = null;

  function show(area) {
    if (current) current.classList.remove("at");
    current = area;
    tip.hidden = !area;
    if (!area) return;
    area.classList.add("at");
    tip.textContent = area.dataset.tip.split("|").join("\n");
    const box = area.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth - size.width - 8;
    const above = box.top - size.height - 8;
    tip.style.left = `${Math.max(8, Math.min(box.left + (box.width - size.width) / 2, room))}px`;
    tip.style.top = `${above > 8 ? above : Math.max(8, Math.min(box.bottom + 8, innerHeight - size.height - 8))}px`;
  }

  // Of the areas that lie in the wanted direction, the nearest one.
  function next(areas, from, key) {
    const along = key === "ArrowLeft" || key === "ArrowRight" ? "x" : "y";
    const across = along === "x" ? "y" : "x";
    const sign = key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1;
    const at = (area) => ({
      x: area.x.baseVal.value + area.width.baseVal.value / 2,
      y: area.y.baseVal.value + area.height.baseVal.value / 2,
    });
    const here = at(from);
    let best = from;
    let least = Infinity;
    for (const area of areas) {
      const there = at(area);
      const ahead = sign * (there[along] - here[along]);
      const distance = ahead + 10 * Math.abs(there[across] - here[across]);
      if (ahead > 0.01 && distance < least) [best, least] = [area, distance];
    }
    return best;
  }

  document.addEventListener("pointerover", (event) => {
    show(event.target.closest ? event.target.closest(".hit") : null);
  });
  document.addEventListener("scroll", () => show(null), { passive: true });
  document.addEventListener("focusout", () => show(null));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return show(null);
    const chart = event.target.closest("svg.chart");
    if (!chart || !event.key.startsWith("Arrow")) return;
    const areas = [...chart.querySelectorAll(".hit")];
    if (!areas.length) return;
    event.preventDefault();
    show(current && chart.contains(current) ? next(areas, current, event.key) : areas[0]);
  });

  // "Data" under a figure saves the table itself; without a script it leads to the list of tables.
  for (const link of document.querySelectorAll("[data-save]")) {
    link.addEventListener("click", (event) => {
      const target = document.getElementById(link.dataset.save);
      if (!target.href.startsWith("data:")) return;
      event.preventDefault();
      target.click();
    });
  }
})();
