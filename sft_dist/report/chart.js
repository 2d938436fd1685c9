"use strict";
// Again where the figures of a page were replaced.
const bindCharts = () => {
  const figures = [...document.querySelectorAll("figure.chart")].map((element) => ({
    element,
    area: element.querySelector(".area"),
    cursor: element.querySelector(".cursor"),
    readout: element.querySelector(".readout"),
    values: JSON.parse(element.querySelector(".values").textContent),
    scale: "linear",
    places: {},
  }));
  let counted = Object.keys(figures.length ? figures[0].values.counts : { steps: 0 })[0];

  const viewOf = (figure) => figure.values.views[`${counted} ${figure.scale}`];

  const figureText = (value) => {
    if (value === null || value === undefined) return "not finite";
    const size = Math.abs(value);
    if (size >= 1000) return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
    if (size !== 0 && size < 0.001) return value.toExponential(2).replace("e-0", "e-");
    return String(Number(value.toPrecision(4)));
  };
  const placeText = (x) =>
    counted === "hours" ? `${x.toFixed(2)} hours` : `${counted === "steps" ? "step " : ""}${Math.round(x).toLocaleString("en-US")}${counted === "tokens" ? " tokens" : ""}`;

  const nearest = (places, x) => {
    let low = 0, high = places.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (places[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - places[low - 1] < places[low] - x ? low - 1 : low;
  };

  // Every place that a figure has a value at, in order: what the arrow keys go through.
  const placesOf = (figure) => {
    if (!figure.places[counted]) {
      const all = [...figure.values.lines, ...figure.values.dots].flatMap((each) => each.x[counted]);
      figure.places[counted] = [...new Set(all)].sort((one, other) => one - other);
    }
    return figure.places[counted];
  };

  const part = (name, text) => {
    const span = document.createElement("span");
    span.textContent = name ? `${name} ` : "";
    const bold = document.createElement("b");
    bold.textContent = text;
    span.append(bold);
    return span;
  };

  const tell = (figure, x) => {
    const view = viewOf(figure), all = placesOf(figure);
    if (!view || !all.length) return;
    const width = view.x[1] - view.x[0], at = all[nearest(all, x)];
    const said = [];
    for (const line of figure.values.lines) {
      const places = line.x[counted];
      if (!places.length) continue;
      const i = nearest(places, at);
      if (Math.abs(places[i] - at) > width / 20) continue; // of a run that was over by then
      let text = figureText(line.raw || !line.smooth.length ? line.mean[i] : line.smooth[i]);
      if (line.raw && line.low && line.low[i] !== null) text += ` (${figureText(line.low[i])} to ${figureText(line.high[i])} in ${line.of.toLocaleString("en-US")} steps)`;
      said.push(part(line.name, text));
      if (line.raw && line.smooth.length) said.push(part("smoothed", figureText(line.smooth[i])));
    }
    for (const dots of figure.values.dots) {
      const places = dots.x[counted];
      if (!places.length) continue;
      const i = nearest(places, at);
      if (Math.abs(places[i] - at) > width / 40) continue;
      said.push(part(dots.name, `${figureText(dots.y[i])}${places[i] === at ? "" : ` at ${placeText(places[i])}`}`));
    }
    for (const mark of figure.values.marks) {
      if (mark.x[counted] !== undefined && Math.abs(mark.x[counted] - at) <= width / 150) said.push(part("", mark.text));
    }
    const where = document.createElement("b");
    where.textContent = placeText(at);
    figure.readout.replaceChildren(where, ...said);
    figure.readout.hidden = false;
    figure.cursor.style.left = `${(100 * (at - view.x[0])) / width}%`;
    figure.cursor.hidden = false;
    // Beside the line, in the half that is free.
    figure.readout.classList.toggle("left", at - view.x[0] > width / 2);
    figure.at = at;
  };

  // What one shows, all show, at the same place.
  const tellAll = (x) => figures.forEach((figure) => tell(figure, x));
  const hideAll = () => figures.forEach((figure) => { figure.cursor.hidden = true; figure.readout.hidden = true; });

  const show = (figure) => {
    for (const view of figure.element.querySelectorAll(".view")) view.hidden = view.dataset.view !== `${counted} ${figure.scale}`;
    for (const button of figure.element.querySelectorAll("[data-scale]")) button.setAttribute("aria-pressed", String(button.dataset.scale === figure.scale));
  };

  for (const figure of figures) {
    const follow = (event) => {
      const box = figure.area.getBoundingClientRect(), view = viewOf(figure);
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      tellAll(view.x[0] + share * (view.x[1] - view.x[0]));
    };
    figure.area.addEventListener("pointermove", follow);
    figure.area.addEventListener("pointerdown", follow);
    figure.area.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && document.activeElement !== figure.area) hideAll(); });
    figure.area.addEventListener("focus", () => {
      for (const each of figures) each.readout.setAttribute("aria-live", each === figure ? "polite" : "off"); const places = placesOf(figure); if (places.length) tellAll(figure.at ?? places[places.length - 1]); });
    figure.area.addEventListener("blur", hideAll);
    figure.area.addEventListener("keydown", (event) => {
      const places = placesOf(figure);
      if (!places.length) return;
      const now = nearest(places, figure.at ?? places[places.length - 1]), step = event.shiftKey ? 10 : 1;
      const next = { ArrowLeft: now - step, ArrowRight: now + step, Home: 0, End: places.length - 1 }[event.key];
      if (event.key === "Escape") hideAll();
      if (next === undefined) return;
      event.preventDefault();
      tellAll(places[Math.min(places.length - 1, Math.max(0, next))]);
    });
    for (const button of figure.element.querySelectorAll("[data-scale]")) {
      button.addEventListener("click", () => { figure.scale = button.dataset.scale; show(figure); });
    }
  }
  for (const button of document.querySelectorAll("[data-counted]")) {
    button.addEventListener("click", () => {
      counted = button.dataset.counted;
      hideAll();
      for (const each of document.querySelectorAll("[data-counted]")) each.setAttribute("aria-pressed", String(each === button));
      figures.forEach((figure) => { figure.at = undefined; show(figure); });
    });
  }
  for (const element of document.querySelectorAll(".switch")) element.hidden = false;
};
bindCharts();
