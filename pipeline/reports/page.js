"use strict";
const page = JSON.parse(document.getElementById("page-data").textContent);
const shown = page.runs.map(() => true);
const axis = document.getElementById("x-axis");
const panels = [...document.querySelectorAll(".panel")];
const model = id => Bokeh.documents[0].get_model_by_id(id);

function draw() {  // every panel: the chosen key over the chosen axis
  panels.forEach((element, p) => {
    const key = element.querySelector("select").value, ids = page.panels[p];
    model(ids.axis).axis_label = axis.selectedOptions[0].textContent;
    page.runs.forEach((run, r) => {
      const [source, line, dots] = ids.runs[r].map(model);
      const [index, y] = run.curves[key] ?? [-1, []];
      const [step, hours] = run.axes[index] ?? [[], []];
      const x = axis.value == "hours" ? hours
        : axis.value == "images" ? step.map(s => s * run.images_per_step) : step;
      source.data = {x, y, step};
      line.visible = shown[r];
      dots.visible = shown[r] && y.length <= 40;
    });
  });
}

function show(r, visible) {
  shown[r] = visible;
  document.querySelectorAll(`[data-run="${r}"]`).forEach(element =>
    element.tagName == "BUTTON" ? element.setAttribute("aria-pressed", visible)
      : element.classList.toggle("hidden", !visible));
}

const slider = document.getElementById("grid-step");
function turn() {  // each run's newest grid that is not after the chosen step
  const step = page.steps[slider.value];
  document.getElementById("grid-number").textContent = step;
  document.querySelectorAll("figure[data-run]").forEach(figure => {
    const grids = page.grids[figure.dataset.run];
    const steps = Object.keys(grids).map(Number).filter(s => s <= step);
    const newest = Math.max(...steps), image = figure.querySelector("img");
    image.hidden = !steps.length;
    if (steps.length) image.src = grids[newest];
    figure.querySelector("span").textContent = steps.length ? `step ${newest}` : "none yet";
  });
}

document.querySelectorAll(".legend button").forEach((button, r) => {
  button.addEventListener("click", () => { show(r, !shown[r]); draw(); });
  button.addEventListener("dblclick", () => {  // this one alone, or all again
    const alone = shown.every((visible, other) => visible == (other == r));
    shown.forEach((_, other) => show(other, alone || other == r));
    draw();
  });
});
if (slider) { slider.addEventListener("input", turn); turn(); }
function start() {  // once Bokeh has its models
  if (!globalThis.Bokeh?.documents?.length) return setTimeout(start, 20);
  [axis, ...panels.map(p => p.querySelector("select"))].forEach(s => s.addEventListener("change", draw));
  draw();
}
if (axis) start();
