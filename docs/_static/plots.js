// Draws the figures of a page in the colours of the page, and again when these change.
"use strict";

function colours() {
  const style = getComputedStyle(document.body);
  const get = (name) => style.getPropertyValue(name).trim();
  return { text: get("--color-foreground-primary"), line: get("--color-background-border") };
}

function draw(element) {
  const figure = JSON.parse(element.querySelector("script").textContent);
  const { text, line } = colours();
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  const template = {
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: text },
      colorway: ["#2a7fba", "#e07b39", "#3a9d5d", "#b5509c", "#8a7a2f", "#c94f4f"],
      xaxis: axis,
      yaxis: axis,
      margin: { l: 50, r: 20, t: 60, b: 50 },
    },
  };
  let target = element.querySelector("div");
  if (!target) {
    target = element.appendChild(document.createElement("div"));
  }
  const layout = { ...figure.layout, template, autosize: true };
  delete layout.width;
  Plotly.react(target, figure.data, layout, { responsive: true, displaylogo: false }).then(() => {
    if (figure.frames && !target.dataset.frames) {
      target.dataset.frames = "yes";
      Plotly.addFrames(target, figure.frames);
    }
  });
}

function drawAll() {
  document.querySelectorAll("figure.plot").forEach(draw);
}

window.addEventListener("DOMContentLoaded", () => {
  drawAll();
  new MutationObserver(drawAll).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
});
