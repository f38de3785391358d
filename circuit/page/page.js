// The page's behaviour: one slider for all charts and tables, the theme, the example.
const page = JSON.parse(document.getElementById("page-data").textContent);
const views = []; // {view, steps, at}
const moved = []; // called with the page's step
let step = page.steps.at(-1) ?? 0;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// The last step at or before the page's, else the first that there is.
function snap(steps, wanted) {
  return steps.findLast((one) => one <= wanted) ?? steps[0];
}

function records(columns) {
  const names = Object.keys(columns);
  return names.length === 0
    ? []
    : columns[names[0]].map((_, i) => Object.fromEntries(names.map((n) => [n, columns[n][i]])));
}

function stepsOf(rows) {
  return [...new Set(rows.map((row) => row.step))].filter((s) => s !== undefined).sort((a, b) => a - b);
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  return Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6
    ? value.toExponential(3)
    : String(Number(value.toPrecision(5)));
}

// A figure takes as many rows of a pixel as it is high: beside a tall one stand several.
const fitted = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  target.style.gridRowEnd = `span ${Math.ceil(target.getBoundingClientRect().height)}`;
}));

async function drawChart(figure, chart, data) {
  const holder = make("div", { class: "chart" });
  figure.append(make("figcaption", {}, chart.title), holder);
  const used = {};
  JSON.stringify(chart.spec, (key, value) => {
    if (key === "data" && value?.name in data) used[value.name] = data[value.name];
    return value;
  });
  const spec = { ...chart.spec, datasets: { ...chart.spec.datasets, ...used } };
  const { view } = await window.vegaEmbed(holder, spec, {
    mode: "vega-lite", renderer: "svg", actions: false, config: page.style, tooltip: { offsetY: 14 },
    logLevel: 0,
  });
  const steps = stepsOf(data[chart.follows]);
  const own = { view, steps, at: null };
  views.push(own);
  if (steps.length > 0) {
    moved.push((wanted) => {
      const at = snap(steps, wanted);
      if (own.at === at) return undefined;
      own.at = at;
      return view.signal("step", at).runAsync();
    });
  }
}

function drawTable(parent, table, rows, open) {
  const body = make("tbody");
  const names = table.columns.map(([name]) => name);
  const words = new Set(names.filter((n) => rows.some((row) => typeof row[n] === "string")));
  const kind = (name) => (words.has(name) ? { class: "word" } : {});
  const head = make("tr", {}, ...table.columns.map(([n, heading]) => make("th", { scope: "col", ...kind(n) }, heading)));
  const caption = make("summary", {}, table.title);
  const scroll = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": table.title },
    make("table", {}, make("thead", {}, head), body));
  parent.append(make("details", open ? { open: "" } : {}, caption, scroll));
  const steps = stepsOf(rows);
  const fill = (some) => body.replaceChildren(...some.map((row) => make("tr", {}, ...names.map((n) => {
    const cell = make("td", kind(n), shown(row[n]));
    if (typeof row[n] === "number") cell.title = String(row[n]);
    return cell;
  }))));
  if (steps.length === 0) return fill(rows);
  // each run of a comparison has steps of its own
  const runs = [...new Set(rows.map((row) => row.run))].map((run) => rows.filter((row) => row.run === run));
  moved.push((wanted) => {
    const kept = runs.flatMap((own) => {
      const at = snap(stepsOf(own), wanted);
      return own.filter((row) => row.step === at);
    });
    const at = [...new Set(kept.map((row) => row.step))];
    caption.textContent = `${table.title}, step ${at.join(", ")}`;
    fill(kept);
  });
  return undefined;
}

function drawExample(parent, example) {
  const ask = (id, label, names, first) => {
    const select = make("select", { id }, ...names.map(([value, text]) => make("option", { value }, text)));
    select.value = first;
    select.addEventListener("change", () => show());
    return [make("label", { for: id }, `${label} `), select];
  };
  const heads = ask("head", "head", example.heads.map((h) => [h, h]), example.winner);
  const values = example.reads.map((r) => Object.values(r.slices)[0] ?? 0);
  const sliced = (r) => Object.entries(r.slices).map(([name, value]) => ` ${name} ${value},`).join("");
  const reads = ask("read", "read", example.reads.map((r, i) =>
    [i, `${r.asked} at ${r.position}:${sliced(r)} answer ${r.answer}`]), values.indexOf(Math.max(...values)));
  const says = make("p", { "aria-live": "polite" });
  const tokens = make("ol", { class: "tokens", "aria-label": "tokens with attention" });
  const grid = make("table", { class: "heads" });
  parent.append(
    make("div", { class: "controls" }, make("span", {}, ...heads), make("span", {}, ...reads)),
    says, tokens,
    make("p", {}, make("span", { class: "key", style: "border-color: var(--c2)" }, "asks"), " ",
      make("span", { class: "key", style: "border-color: var(--c3)" }, `${example.support}: where the answer can be read`),
      " Shade and number: the attention from the asking position."),
    make("details", { open: "" }, make("summary", {}, `Attention of every head on ${example.support}`),
      make("div", { class: "wide" }, grid)),
  );
  const shade = (weight) => `background: rgba(var(--attention), ${(0.75 * Math.sqrt(weight)).toFixed(3)})`;

  function show() {
    const at = snap(example.steps, step);
    const index = example.steps.indexOf(at);
    const read = Number(document.getElementById("read").value);
    const head = example.heads.indexOf(document.getElementById("head").value);
    const asked = example.reads[read];
    const weights = example.attention[index][head][read];
    const said = example.predictions[index][read];
    says.textContent = `Step ${at}: the model says ${said.token} with p = ${said.probability.toFixed(4)}, ` +
      (said.token === asked.answer ? "which is right" : `the answer is ${asked.answer}`) +
      `; ${example.heads[head]} puts ${weights[asked.support]} on ${example.support}.`;
    tokens.replaceChildren(...example.tokens.map((token, i) => {
      const weight = weights[i];
      const item = make("li", { "data-position": i }, token,
        make("small", {}, weight === undefined || weight < 0.005 ? "" : String(weight)));
      if (weight === undefined) item.className = "later";
      else item.setAttribute("style", shade(weight));
      if (i === asked.support) item.className = "support";
      if (i === asked.position) item.className = "query";
      item.title = weight === undefined ? `${token}, position ${i}: later` : `${token}, position ${i}: ${weight}`;
      return item;
    }));
    const layers = [...new Set(example.heads.map((name) => name.split("H")[0]))];
    const rows = layers.map((layer) => example.heads.filter((name) => name.split("H")[0] === layer));
    grid.replaceChildren(...rows.map((row) => make("tr", {}, ...row.map((name) => {
      const value = example.attention[index][example.heads.indexOf(name)][read][asked.support];
      return make("td", { style: shade(value) }, name, make("small", {}, value.toFixed(4)));
    }))));
  }
  moved.push(show);
}

function draw(name, panel) {
  const section = document.getElementById(name);
  const data = Object.fromEntries(Object.entries(panel.data).map(([n, columns]) => [n, records(columns)]));
  const figures = section.querySelector(".charts");
  const drawn = panel.charts.map((chart) => {
    const figure = make("figure");
    figures.append(figure);
    fitted.observe(figure);
    return drawChart(figure, chart, data);
  });
  const tables = section.querySelector(".tables");
  panel.tables.forEach((table) => drawTable(tables, table, data[table.data], panel.charts.length === 0));
  if (panel.example) drawExample(section.querySelector(".example"), panel.example);
  const badge = section.querySelector(".at");
  const all = panel.example
    ? [panel.example.steps]
    : panel.charts.map((chart) => stepsOf(data[chart.follows]));
  if (badge) {
    moved.push((wanted) => {
      const at = [...new Set(all.map((steps) => snap(steps, wanted)))].filter((s) => s !== undefined);
      badge.textContent = at.length > 0 ? `at step ${at.join(", ")}` : "";
    });
  }
  return Promise.all(drawn);
}

async function moveTo(index) {
  step = page.steps[index];
  const slider = document.getElementById("step");
  slider.value = index;
  slider.setAttribute("aria-valuetext", `step ${step}`);
  document.getElementById("shown").textContent = step;
  await Promise.all(moved.map((one) => one(step)));
  document.documentElement.dataset.step = step;
}

function setTheme(theme) {
  const button = document.getElementById("theme");
  button.textContent = theme;
  button.setAttribute("aria-label", `Theme: ${theme === "auto" ? "as the system" : theme}`);
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

// A link to what is folded opens it.
function unfold() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
}

function listen() {
  const slider = document.getElementById("step");
  slider.addEventListener("input", () => moveTo(Number(slider.value)));
  const by = (change) => () =>
    moveTo(Math.min(page.steps.length - 1, Math.max(0, Number(slider.value) + change)));
  document.getElementById("back").addEventListener("click", by(-1));
  document.getElementById("on").addEventListener("click", by(1));
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  button.addEventListener("click", () =>
    setTheme(themes[(themes.indexOf(button.textContent) + 1) % themes.length]));
}

await Promise.all(Object.entries(page.panels).map(([name, panel]) => draw(name, panel)));
if (page.steps.length > 0) {
  listen();
  await moveTo(page.steps.length - 1);
}
window.addEventListener("hashchange", unfold);
unfold();
document.documentElement.dataset.ready = "";
