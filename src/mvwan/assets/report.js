// Draws the figures that stand as JSON in the page, in the colours of the chosen theme. Plotly is in the page already.
(() => {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  // Figures name colours by their CSS variable, as "var:on"; plotly needs the value.
  const painted = (value) => {
    if (typeof value === "string" && value.startsWith("var:")) return colour(value.slice(4));
    if (Array.isArray(value)) return value.map(painted);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item)]));
    return value;
  };

  const axis = (own) => ({ gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true, ...painted(own), title: { standoff: 8, ...own.title } });

  const draw = (place) => {
    const figure = JSON.parse(place.querySelector("script").textContent);
    const narrow = place.clientWidth < 480;
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("ink"), family: "system-ui, sans-serif", size: narrow ? 11 : 12.5 },
      margin: { l: 54, r: 12, t: 40, b: 64 + 9 * figure.data.filter((trace) => trace.showlegend !== false).length },
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: narrow ? 10 : 12 } },
      hoverlabel: { font: { family: "system-ui, sans-serif" } },
      ...painted(figure.layout),
    };
    for (const name of Object.keys(layout)) if (/^[xy]axis\d*$/.test(name)) layout[name] = axis(layout[name]);
    if (layout.scene) for (const name of ["xaxis", "yaxis", "zaxis"]) layout.scene[name] = { backgroundcolor: "rgba(0,0,0,0)", ...axis(layout.scene[name]) };
    const target = place.querySelector(".plot");
    window.Plotly.react(target, painted(figure.data), layout, { displaylogo: false, responsive: true, displayModeBar: false });
  };

  const drawAll = () => document.querySelectorAll("[data-figure]").forEach(draw);
  const show = (theme) => {
    root.dataset.theme = theme;
    drawAll();
  };

  for (const video of document.querySelectorAll("video")) {
    const toggle = () => (video.paused ? video.play() : video.pause());
    video.addEventListener("click", toggle);
    video.addEventListener("keydown", (event) => event.key === " " && (event.preventDefault(), toggle()));
    if (window.matchMedia("(prefers-reduced-motion: reduce)").matches) video.pause();
  }

  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((details) => (details.open = true)));
  document.querySelector(".theme").addEventListener("click", () => show(root.dataset.theme === "dark" ? "light" : "dark"));
  system.addEventListener("change", (event) => show(event.matches ? "dark" : "light"));
  show(system.matches ? "dark" : "light");
})();
