"use strict";
// Draws what /ws/stream sends (or, where that does not work, what polling brings). All texts go in as text nodes.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const PARTS = ["assembly", "decide", "apply", "guard"];
const STAGES = ["germinated", "training", "blending", "shadowing", "probationary", "fossilized", "culled", "embargoed"];
let chosen = new URLSearchParams(location.search).get("run") || "";
let socket = null, poll = null, data = null, asked = null;

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function shape(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
const big = (n) => n === undefined ? "–" : n >= 1e6 ? `${(n / 1e6).toFixed(2)} M` : n >= 1e4 ? `${(n / 1e3).toFixed(0)} k` : `${Math.round(n)}`;
const percent = (n, digits = 1) => n === undefined || Number.isNaN(n) ? "–" : `${(100 * n).toFixed(digits)} %`;
const fixed = (n, digits) => n === undefined ? "–" : n.toFixed(digits);
const clock = (ns) => new Date(ns / 1e6).toLocaleTimeString();
const numbers = (seed) => `seed ${seed.seed}`;
const colour = (stage) => `var(--${String(stage).toLowerCase()}, var(--germinated))`;

function tip(event, text) {
  const box = $("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8)}px`;
}
function explain(node, text) {
  node.addEventListener("pointermove", (event) => tip(event, text));
  node.addEventListener("pointerleave", (event) => tip(event, ""));
  return node;
}
function key(target, names, colours) {
  target.replaceChildren(...names.map((name) => {
    const dot = el("i");
    dot.style.background = colours(name);
    return el("span", {}, dot, name);
  }));
}
function empty(target, text) { target.replaceChildren(el("p", { class: "empty" }, text)); }

// ---- scales and axes -------------------------------------------------------------------------------------------

function ticks(low, high, count = 4) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(at);
  return found;
}
function frame(target, height, { first, last, low, high, left = 44, label = (v) => `${v}`, at = (v) => `${v}`, rows = true }) {
  const width = Math.max(target.clientWidth, 240), bottom = 22, right = 12, top = 14;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  const span = Math.max(last - first, 1);
  const x = (epoch) => left + ((epoch - first) / span) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low || 1)) * (height - bottom - top);
  if (rows) for (const value of ticks(low, high)) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, label(value)));
  }
  const shown = ticks(first, last, Math.min(12, Math.max(2, Math.floor((width - left) / 60)))).filter(Number.isInteger);
  for (const epoch of shown) svg.append(shape("text", { x: x(epoch), y: height - 6, "text-anchor": "middle" }, at(epoch)));
  target.replaceChildren(svg);
  return { svg, x, y, width, height, left, right, top, bottom };
}
function span(run) {
  const planned = Number(run.facts.epochs) || 0;
  return { first: run.epochs[0].epoch, last: Math.max(run.epochs.at(-1).epoch, planned, run.epochs[0].epoch + 1) };
}

// ---- the charts ------------------------------------------------------------------------------------------------

function curves(target, run, lines, { label, floor, ceiling, others = [] }) {
  const rows = run.epochs.filter((row) => lines.some((line) => row[line.name] !== undefined));
  if (!rows.length) return empty(target, "Nothing measured yet.");
  const values = rows.flatMap((row) => lines.map((line) => row[line.name])).filter((v) => v !== undefined);
  values.push(...others.flatMap((other) => other.points.map((point) => point[1])));
  const pad = (Math.max(...values) - Math.min(...values)) * 0.08 || 0.05;
  const low = Math.max(floor ?? -Infinity, Math.min(...values) - pad), high = Math.min(ceiling ?? Infinity, Math.max(...values) + pad);
  const f = frame(target, 240, { ...span(run), low, high, label });
  for (const other of others) {
    const points = other.points.map(([epoch, value]) => `${f.x(epoch)},${f.y(value)}`);
    f.svg.append(explain(shape("polyline", { class: "curve other", points: points.join(" ") }), other.title));
    const [epoch, value] = other.points.at(-1);
    f.svg.append(shape("text", { class: "over", x: Math.min(f.x(epoch), f.width - f.right), y: f.y(value) + 14, "text-anchor": "end" }, other.title));
  }
  marks(f, run);
  turns(f, run);
  for (const line of lines) {
    const points = rows.filter((row) => row[line.name] !== undefined).map((row) => [f.x(row.epoch), f.y(row[line.name])]);
    f.svg.append(shape("polyline", { class: `curve ${line.style}`, points: points.map((p) => p.join()).join(" ") }));
    const [cx, cy] = points.at(-1);
    f.svg.append(shape("circle", { class: `dot-${line.style}`, cx, cy, r: 3.5 }));
  }
  hover(f, run, rows, (row) => lines.map((line) => `${line.title} ${label(row[line.name], true)}`).join("\n"));
}
// The other arms of the same comparison, as thin lines behind this one.
function siblings(status, run) {
  return status.runs
    .filter((other) => other.run !== run.run && family(other) === family(run) && other.accuracy.length > 1)
    .map((other) => ({ title: other.facts.arm ?? other.run, points: other.accuracy.filter(([epoch]) => epoch <= span(run).last) }));
}
const family = ({ run, facts }) => run.endsWith(`-${facts.arm}`) ? run.slice(0, -facts.arm.length - 1) : run;
function marks(f, run) {
  for (const graft of run.grafts) {
    const at = f.x(graft.epoch);
    f.svg.append(shape("line", { class: "graft", x1: at, x2: at, y1: f.top, y2: f.height - f.bottom }));
    const mark = shape("path", { class: "mark", d: `M${at - 5} ${f.top - 8}h10l-5 8z` });
    f.svg.append(explain(mark, `graft of seed ${graft.seed} in ${graft.slot}\nepoch ${graft.epoch}, step ${graft.step}, ${graft.ms} ms`));
  }
}
function turns(f, run) {
  for (const turn of run.rollbacks ?? []) {
    const at = f.x(turn.to);
    f.svg.append(shape("line", { class: "limit", x1: at, x2: at, y1: f.top, y2: f.height - f.bottom }));
    const mark = shape("path", { class: "mark turn", d: `M${at + 6} ${f.top - 8}v8l-8 -4z` });
    f.svg.append(explain(mark, `back from epoch ${turn.from_epoch} to ${turn.to}, branch ${turn.branch}\n${turn.origin}: ${turn.reason}`));
  }
}
function hover(f, run, rows, text, place = (row) => `epoch ${row.epoch}`) {
  const cross = shape("line", { class: "cross", y1: f.top, y2: f.height - f.bottom, visibility: "hidden" });
  const area = shape("rect", { x: f.left, y: f.top, width: f.width - f.left - f.right, height: f.height - f.top - f.bottom, fill: "transparent" });
  area.addEventListener("pointermove", (event) => {
    const at = event.clientX - f.svg.getBoundingClientRect().left;
    const row = rows.reduce((best, next) => Math.abs(f.x(next.epoch) - at) < Math.abs(f.x(best.epoch) - at) ? next : best);
    cross.setAttribute("x1", f.x(row.epoch)); cross.setAttribute("x2", f.x(row.epoch)); cross.setAttribute("visibility", "visible");
    tip(event, `${place(row)}\n${text(row)}`);
  });
  area.addEventListener("pointerleave", (event) => { cross.setAttribute("visibility", "hidden"); tip(event, ""); });
  f.svg.append(cross, area);
  for (const mark of f.svg.querySelectorAll(".mark")) f.svg.append(mark);
}
function timeline(target, run) {
  if (!run.seeds.length || !run.epochs.length) return empty(target, "No seed has germinated yet.");
  const row = 26, height = run.seeds.length * row + 36, { first, last } = span(run);
  const f = frame(target, height, { first, last, low: 0, high: 1, left: target.clientWidth < 560 ? 92 : 190, rows: false });
  const ended = run.status === "running" ? run.epoch : last;
  run.seeds.forEach((seed, index) => {
    const top = index * row + 8, narrow = f.left < 100;
    const name = narrow ? `${seed.seed} ${seed.blueprint}` : `${numbers(seed)} · ${seed.blueprint} · ${seed.slot}`;
    f.svg.append(shape("text", { class: "name", x: 0, y: top + 14 }, name));
    seed.stages.forEach((step, place) => {
      if (step.stage === "DORMANT") return;
      const next = seed.stages[place + 1], from = f.x(Math.max(step.epoch, first));
      const open = next ? next.epoch : Math.max(ended, step.epoch);
      const to = Math.max(f.x(open), from + 4);
      const bar = shape("rect", { x: from, y: top, width: to - from - 1, height: row - 8, rx: 3 });
      bar.style.fill = colour(step.stage);
      f.svg.append(explain(bar, `${name}\n${step.stage} from epoch ${step.epoch}${next ? ` to ${next.epoch}` : ""}\n${step.reason}`));
      if (to - from > 74) f.svg.append(shape("text", { class: "inside", x: from + 6, y: top + 13 }, step.stage.toLowerCase()));
    });
  });
}
function budget(target, run, limit) {
  const rows = run.epochs.filter((row) => row.boundary !== undefined);
  if (!rows.length) return empty(target, "No boundary has been timed yet.");
  const high = Math.max(limit * 1.15, ...rows.map((row) => row.boundary));
  const shown = span(run);
  const f = frame(target, 200, { first: shown.first - 0.6, last: shown.last + 0.6, low: 0, high, label: (v) => `${v} ms`, left: 48 });
  const wide = Math.max(2, Math.min(18, (f.x(1) - f.x(0)) * 0.7));
  for (const row of rows) {
    let below = 0;
    const bar = shape("g");
    const known = PARTS.filter((part) => row[part] !== undefined);
    for (const part of known) {
      const top = f.y(below + row[part]);
      const piece = shape("rect", { x: f.x(row.epoch) - wide / 2, y: top, width: wide, height: Math.max(0, f.y(below) - top) });
      piece.style.fill = `var(--${part})`;
      bar.append(piece);
      below += row[part];
    }
    const text = known.map((part) => `${part} ${fixed(row[part], 2)} ms`).join("\n");
    f.svg.append(explain(bar, `epoch ${row.epoch}: ${fixed(row.boundary, 2)} ms\n${text}`));
  }
  f.svg.append(shape("line", { class: "limit", x1: f.left, x2: f.width - f.right, y1: f.y(limit), y2: f.y(limit) }));
  f.svg.append(shape("text", { class: "over", x: f.width - f.right, y: f.y(limit) - 5, "text-anchor": "end" }, `budget ${limit} ms`));
}

// ---- texts -----------------------------------------------------------------------------------------------------

function tiles(run) {
  const last = run.latest, totals = run.totals, planned = run.facts.epochs ? ` / ${run.facts.epochs}` : "";
  const shown = [
    [percent(last.validation_accuracy), "validation accuracy"],
    [`${run.epoch}${planned}`, "epoch"],
    [big(last.parameters), "parameters"],
    [`${totals.seeds_live ?? 0} · ${totals.seeds_fossilized ?? 0}`, "seeds growing · fossilised"],
    [last.boundary === undefined ? "–" : `${last.boundary.toFixed(1)} ms`, "last boundary"],
    [`${totals.missed_deadlines ?? 0}`, "missed deadlines"],
    ...(totals.risk_level ? [[["", "green", "yellow", "orange", "red", "critical"][totals.risk_level], "risk"]] : []),
    ...(run.facts.test_accuracy ? [[percent(Number(run.facts.test_accuracy)), "test accuracy"]] : []),
  ];
  $("tiles").replaceChildren(...shown.map(([value, name]) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, name))));
}
function entry(when, title, text, style = "") {
  return el("li", {}, el("span", { class: "when" }, when), el("div", {}, el("b", { class: style }, title), el("p", {}, text || "")));
}
function fill(target, items, none) { items.length ? target.replaceChildren(...items) : empty(target, none); }
// Decisions in a row that changed nothing are one entry, under the reason of the last.
function episodes(decisions) {
  const found = [];
  for (const d of decisions) {
    const quiet = d.operation === "NO_OP" && d.missed !== "true", before = found.at(-1);
    if (quiet && before?.quiet) before.first = d.epoch;
    else found.push({ ...d, quiet, first: d.epoch });
  }
  return found;
}
function decision(d) {
  const what = d.quiet ? "no change" : [d.operation?.toLowerCase().replaceAll("_", " "), d.blueprint, d.slot && `in ${d.slot}`].filter(Boolean).join(" ");
  const when = d.first === d.epoch ? `epoch ${d.epoch}` : `${d.first}–${d.epoch}`;
  if (d.missed === "true") return entry(when, "too late: no change", d.why, "bad");
  const by = d.quiet || !d.controller ? what : `${what} · ${d.controller}`;
  if (d.refused) return entry(when, `${by}: refused`, `${d.refused} (asked for: ${d.why})`, "bad");
  return entry(when, by, d.why, d.quiet ? "quiet" : "deed");
}
function lists(run) {
  fill($("decisions"), episodes(run.decisions).slice(0, 80).map(decision), "No decision yet.");
  fill($("gates"), run.gates.slice(0, 60).map((g) => {
    const evidence = Object.entries(g.evidence).map(([name, value]) => `${name} ${value}`).join(" · ");
    const title = `${g.gate} ${g.passed ? "passed" : "refused"} for seed ${g.seed}`;
    return entry(`epoch ${g.epoch}`, title, [g.reason, evidence].filter(Boolean).join(" — "), g.passed ? "good" : "bad");
  }), "No gate has been asked yet.");
  fill($("incidents"), run.incidents.slice(0, 40).map((i) => entry(`epoch ${i.epoch}`, i.kind, i.message, "bad")), "None.");
}
function backends(status) {
  const pairs = Object.entries(status.backends).map(([name, value]) => [name, value]);
  pairs.push(["events", status.store.how + (status.store.dropped ? `, ${status.store.dropped} dropped` : "")]);
  for (const [name, values] of Object.entries(status.streams)) pairs.push([name, `${values.depth ?? 0} waiting, ${values.dead_letters ?? 0} dead letters`]);
  for (const [name, fine] of Object.entries(status.ready)) if (!fine) pairs.push([name, "not reached"]);
  $("backends").replaceChildren(...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}
function table(status, current) {
  const head = el("tr", {}, ...["run", "arm", "state", "epoch", "validation", "test", "parameters"].map((name, i) => el("th", i > 2 ? { class: "number" } : {}, name)));
  const rows = status.runs.map((run) => {
    const cells = [run.run, run.facts.arm ?? "", run.status, run.epoch, percent(run.latest.validation_accuracy),
      run.facts.test_accuracy ? percent(Number(run.facts.test_accuracy)) : "–", big(run.latest.parameters)];
    const line = el("tr", { "data-run": run.run, ...(run.run === current ? { class: "chosen" } : {}) }, ...cells.map((text, i) => el("td", i > 2 ? { class: "number" } : {}, `${text}`)));
    line.addEventListener("click", () => choose(run.run));
    return line;
  });
  $("table").replaceChildren(head, ...rows);
}
function picker(status, current) {
  const select = $("runs");
  if (document.activeElement === select) return;
  select.replaceChildren(...status.runs.map((run) => el("option", { value: run.run }, run.facts.arm ? `${run.run} · ${run.facts.arm}` : run.run)));
  select.value = current;
}
function alerts(status) {
  const shown = status.alerts.filter((alert) => alert.firing || status.now_ns - alert.cleared_ns < 600e9);
  $("alerts").hidden = !shown.length;
  $("alerts").replaceChildren(...shown.map((alert) => {
    const seen = alert.acknowledged_ns >= alert.since_ns;
    const box = el("div", { class: `alert${alert.firing ? " firing" : ""}${seen ? " seen" : ""}` });
    const state = alert.firing ? `fires since ${clock(alert.since_ns)}` : `ended at ${clock(alert.cleared_ns)}`;
    const value = `${alert.value.toFixed(1)}${alert.unit === "1" ? "" : ` ${alert.unit}`} (${alert.condition})`;
    box.append(el("b", { class: alert.firing ? "bad" : "good" }, alert.name), el("span", {}, `${alert.run || "the system"} ${state}`), el("span", {}, value));
    if (alert.firing && !seen) {
      const button = el("button", {}, "Acknowledge");
      button.addEventListener("click", () => acknowledge(alert.id));
      box.append(button);
    }
    box.append(el("p", {}, `${alert.description} ${alert.action} (${alert.runbook})`));
    return box;
  }));
}

// ---- acknowledging ---------------------------------------------------------------------------------------------

async function acknowledge(id) {
  const token = sessionStorage.getItem("token");
  if (!token) { asked = id; $("refusal").textContent = ""; $("asking").showModal(); return; }
  const answer = await fetch(`api/alerts/${encodeURIComponent(id)}/ack`, { method: "POST", headers: { Authorization: `Bearer ${token}` } });
  if (answer.ok) return;
  if (answer.status === 401) sessionStorage.removeItem("token");
  asked = id;
  $("refusal").textContent = (await answer.json()).detail;
  $("asking").showModal();
}
$("asking").addEventListener("close", () => {
  if ($("asking").returnValue !== "ok" || !asked) return;
  sessionStorage.setItem("token", $("token").value.trim());
  $("token").value = "";
  acknowledge(asked);
});

// ---- data in ---------------------------------------------------------------------------------------------------

function draw() {
  if (!data) return;
  const { status, run, school } = data;
  alerts(status); drawSchool(school, run); backends(status); table(status, run?.run); picker(status, run?.run ?? "");
  $("state").textContent = run?.status ?? "no run yet";
  $("state").className = `pill ${!run || run.status === "running" ? "running" : ["failed", "aborted"].includes(run.status) ? "bad" : "good"}`;
  if (!run) return;
  $("facts").textContent = ["task", "dataset", "arm", "mode"].map((name) => run.facts[name]).filter(Boolean).join(" · ");
  document.title = `${percent(run.latest.validation_accuracy)} · ${run.run} · esper_ray`;
  tiles(run); lists(run);
  if (!run.epochs.length) return;
  curves($("accuracy"), run, [{ name: "validation_accuracy", title: "accuracy", style: "a" }],
    { label: (v, exact) => percent(v, exact ? 2 : 0), floor: 0, ceiling: 1, others: siblings(status, run) });
  curves($("loss"), run, [{ name: "validation_loss", title: "validation", style: "a" }, { name: "training_loss", title: "training", style: "b" }],
    { label: (v, exact) => v === undefined ? "–" : v.toFixed(exact ? 4 : 2), floor: 0 });
  timeline($("seeds"), run);
  budget($("boundary"), run, status.budgets.boundary);
}
function take(next) { data = next; tip({}, ""); draw(); }
function live(on, text) { $("live").textContent = text; $("live").classList.toggle("on", on); }

async function fetchAll() {
  try {
    const status = await (await fetch("api/status")).json();
    const name = chosen || status.current;
    const answer = name ? await fetch(`api/runs/${encodeURIComponent(name)}`) : null;
    const school = await (await fetch("api/school")).json();
    take({ status, run: answer?.ok ? await answer.json() : null, school });
    live(true, "live (polling)");
  } catch { live(false, "Nissa does not answer; trying again"); }
}
function listen() {
  clearInterval(poll);
  if (socket) { socket.onclose = null; socket.close(); }
  const base = new URL("ws/stream", location.href);
  base.protocol = base.protocol === "https:" ? "wss:" : "ws:";
  if (chosen) base.searchParams.set("run", chosen);
  socket = new WebSocket(base);
  socket.onmessage = (message) => { clearInterval(poll); take(JSON.parse(message.data)); live(true, "live"); };
  socket.onclose = () => { live(false, "reconnecting"); clearInterval(poll); fetchAll(); poll = setInterval(fetchAll, 2000); setTimeout(listen, 3000); };
}
function choose(run) {
  chosen = run;
  history.replaceState(null, "", `?run=${encodeURIComponent(run)}`);
  listen();
}

$("runs").addEventListener("change", (event) => choose(event.target.value));
addEventListener("resize", () => requestAnimationFrame(draw));
$("loss-key").classList.add("key");
key($("loss-key"), ["validation", "training"], (name) => name === "training" ? "var(--second)" : "var(--accent)");
key($("school-key"), ["return of the last 100 episodes", "greedy evaluation"], (name) => name === "greedy evaluation" ? "var(--second)" : "var(--accent)");
key($("stages"), STAGES, colour);
key($("parts"), PARTS, (name) => `var(--${name})`);
for (const id of ["accuracy", "loss", "seeds", "boundary"]) empty($(id), "Waiting for the first epoch.");
listen();
