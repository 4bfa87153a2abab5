// Values under the pointer. The page says all it has to say without this.
for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const { x, y, series } = JSON.parse(svg.dataset.hover);
  const panel = svg.closest(".panel");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "cursor");
  line.setAttribute("y1", y[3]);
  line.setAttribute("y2", y[2]);
  const tip = document.createElement("div");
  tip.className = "tip";

  const nearest = (steps, step) =>
    steps.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0);

  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const width = svg.viewBox.baseVal.width;
    const at = ((event.clientX - box.left) / box.width) * width;
    const wanted = x[0] + ((at - x[2]) / (x[3] - x[2])) * (x[1] - x[0]);
    const every = [...new Set(series.flatMap((s) => s.steps))];
    const step = every[nearest(every, wanted)];
    const place = x[2] + ((step - x[0]) / (x[1] - x[0])) * (x[3] - x[2]);
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    svg.append(line);
    tip.replaceChildren(row("step " + step));
    for (const s of series) {
      const i = nearest(s.steps, step);
      const value = s.values[i];
      tip.append(row(s.label + " ", value === null ? "not finite" : String(value), s.colour));
    }
    panel.append(tip);
    const inside = box.left - panel.getBoundingClientRect().left + (place / width) * box.width;
    const left = inside + 14 + tip.offsetWidth > panel.clientWidth ? inside - tip.offsetWidth - 14 : inside + 14;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = box.top - panel.getBoundingClientRect().top + 8 + "px";
  };
  const row = (label, value, colour) => {
    const div = document.createElement("div");
    if (colour !== undefined) {
      const dot = document.createElement("i");
      dot.className = colour;
      div.append(dot);
    }
    div.append(label);
    if (value !== undefined) {
      const bold = document.createElement("b");
      bold.textContent = value;
      div.append(bold);
    }
    return div;
  };
  const hide = () => {
    line.remove();
    tip.remove();
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
