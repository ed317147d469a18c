"use strict";
// The school's section of the page. Loaded before page.js, whose helpers it uses when it is called.

let studied = "";

const steps = (n) => n >= 1e6 ? `${+(n / 1e6).toFixed(2)} M` : n >= 1e4 ? `${+(n / 1e3).toFixed(1)} k` : `${n}`;
const figure = (n) => n === undefined || n === null ? "–" : `${+n.toPrecision(3)}`;
const signed = (n) => n > 0 ? `+${figure(n)}` : figure(n);
function moment(ns) {
  const then = new Date(ns / 1e6);
  return then.toDateString() === new Date().toDateString() ? then.toLocaleTimeString() : then.toLocaleString([], { dateStyle: "short", timeStyle: "short" });
}

function drawSchool(school, run) {
  const { trainings, promotions, validations, refusals } = school;
  $("school").hidden = !(trainings.length || promotions.length || validations.length || refusals.length);
  if ($("school").hidden) return;
  const shown = trainings.find((one) => one.run === studied) ?? trainings.find((one) => one.state === "running") ?? trainings[0];
  $("school-name").textContent = shown ? shown.run : "";
  if (shown) learning($("learning"), shown); else empty($("learning"), "No training has been heard of.");
  lessons(trainings, shown, () => drawSchool(school, run));
  standing(school, run);
  fill($("policies"), became(school).slice(0, 30), "Nothing has become of any policy yet.");
}

function learning(target, training) {
  const rows = training.returns.map(([epoch, value]) => ({ epoch, value }));
  const values = [...training.returns, ...training.evaluations].map(([, value]) => value);
  if (!values.length) return empty(target, "No episode has ended yet.");
  const pad = (Math.max(...values) - Math.min(...values)) * 0.08 || 0.05;
  const last = Math.max(training.of, training.steps, 1);
  const f = frame(target, 320, { first: 0, last, low: Math.min(...values) - pad, high: Math.max(...values) + pad, label: figure, at: steps, left: 52 });
  const line = (points, style) => f.svg.append(shape("polyline", { class: `curve ${style}`, points: points.map(([at, value]) => `${f.x(at)},${f.y(value)}`).join(" ") }));
  line(training.returns, "a");
  line(training.evaluations, "b thin");
  if (rows.length) {
    f.svg.append(shape("circle", { class: "dot-a", cx: f.x(rows.at(-1).epoch), cy: f.y(rows.at(-1).value), r: 3.5 }));
    hover(f, training, rows, (row) => `return ${figure(row.value)}`, (row) => `${steps(row.epoch)} steps`);
  }
  for (const [at, value] of training.evaluations) {
    const dot = shape("circle", { class: "dot-b", cx: f.x(at), cy: f.y(value), r: 4.5 });
    f.svg.append(explain(dot, `greedy evaluation at ${steps(at)} steps\nreturn ${figure(value)}`));
  }
}

function lessons(trainings, shown, redraw) {
  const names = ["training", "algorithm", "environment", "state", "progress", "", "return", "evaluation", "steps/s", "lag", "dropped", "heard"];
  const numeric = (i) => i > 4 && i < 11 ? { class: "number" } : {};
  const rows = trainings.map((one) => {
    const { latest } = one;
    const bar = one.of ? el("progress", { value: Math.min(one.steps, one.of), max: one.of, "aria-label": "steps done" }) : "";
    const cells = [one.run, one.algo, one.env, one.state, bar, one.of ? `${steps(one.steps)} / ${steps(one.of)}` : steps(one.steps),
      figure(latest.return), figure(latest.evaluation), figure(latest.steps_per_second), figure(latest.lag), steps(latest.dropped ?? 0), moment(one.updated_ns)];
    const line = el("tr", { "data-run": one.run, ...(one === shown ? { class: "chosen" } : {}) }, ...cells.map((cell, i) => el("td", numeric(i), cell)));
    line.children[3].className = { running: "deed", failed: "bad", finished: "good" }[one.state] ?? "quiet";
    if (one.reason) explain(line, one.reason);
    line.addEventListener("click", () => { studied = one.run; redraw(); });
    return line;
  });
  $("trainings").replaceChildren(...(rows.length ? [el("tr", {}, ...names.map((name, i) => el("th", numeric(i), name))), ...rows] : []));
}

function standing(school, run) {
  const { promoted, validations, records } = school, pairs = [];
  pairs.push(["promoted", promoted ? `${promoted.policy}, since ${moment(promoted.at_ns)}` : "nothing heard of"]);
  const decided = run?.decisions.find((one) => one.controller);
  if (decided) pairs.push(["decided last", `${decided.controller}, in ${run.run} at epoch ${decided.epoch}`]);
  const kept = Object.entries(records).map(([type, count]) => `${count} ${type.replaceAll("_", " ")}s`);
  if (kept.length) pairs.push(["kept to learn from", kept.join(", ")]);
  const last = validations[0];
  if (last) pairs.push(["last validation", `${last.policy} ${last.passed ? "passed" : "failed"} at ${moment(last.at_ns)}`]);
  $("standing").replaceChildren(...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  $("validation").hidden = !last || last.low === null || last.high === null || last.difference === null;
  if (!$("validation").hidden) interval($("validation"), last);
}

const between = (v) => v.low === null || v.high === null ? "" : ` (${signed(v.low)} to ${signed(v.high)})`;
const about = (v) => v.difference === null ? "" : `${signed(v.difference)}${between(v)} against who decided then`;

// Where the difference lies: its interval on a line on which zero is marked.
function interval(target, v) {
  const width = Math.max(target.clientWidth, 200), side = 30, height = 76, line = 32;
  const low = Math.min(v.low, 0), high = Math.max(v.high, 0);
  const x = (value) => side + ((value - low) / (high - low || 1)) * (width - 2 * side);
  const style = v.passed ? "passed" : "failed";
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": about(v) });
  svg.append(shape("line", { class: "grid", x1: 0, x2: width, y1: line, y2: line }));
  svg.append(shape("line", { class: "zero", x1: x(0), x2: x(0), y1: line - 12, y2: line + 26 }));
  svg.append(shape("line", { class: `interval ${style}`, x1: x(v.low), x2: x(v.high), y1: line, y2: line }));
  svg.append(shape("circle", { class: `interval ${style}`, cx: x(v.difference), cy: line, r: 5 }));
  svg.append(shape("text", { x: x(v.low), y: line + 18, "text-anchor": "middle", class: "over" }, signed(v.low)));
  svg.append(shape("text", { x: x(v.high), y: line + 18, "text-anchor": "middle", class: "over" }, signed(v.high)));
  svg.append(shape("text", { x: x(v.difference), y: line - 12, "text-anchor": "middle", class: "name over" }, signed(v.difference)));
  const anchor = x(0) < width / 3 ? "start" : x(0) > width * 2 / 3 ? "end" : "middle";
  svg.append(shape("text", { x: x(0), y: height - 4, "text-anchor": anchor }, "0: as good as who decided then"));
  target.replaceChildren(explain(svg, `${v.policy}: ${about(v)}`));
}

// Promotions, validations and refusals in one list, the newest first.
function became({ promotions, validations, refusals }) {
  const told = [
    ...promotions.map((p) => [p.at_ns, `${p.policy} promoted`, `after ${p.parent}${p.refused ? `; Tamiyo refused it: ${p.refused}` : ""}`, p.refused ? "quiet" : "deed"]),
    ...validations.map((v) => [v.at_ns, `${v.policy} ${v.passed ? "passed" : "failed"} its validation`, about(v), v.passed ? "good" : "bad"]),
    ...refusals.map((r) => [r.at_ns, `${r.policy} refused: ${r.reason.replaceAll("_", " ")}`, r.message, "bad"]),
  ];
  return told.sort((one, other) => other[0] - one[0]).map(([at, title, text, style]) => entry(moment(at), title, text, style));
}
