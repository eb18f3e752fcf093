"use strict";
// What a user or a model wrote enters the page by textContent alone, so that none of it is ever read as HTML.
//
// meta: about the run and each of its steps. Chunk `texts-N` has the groups of step N, `tokens-N` what belongs to their
// tokens: both gzip in base64, unpacked when they are first looked at. Groups become elements as they come into view.

const meta = JSON.parse(document.getElementById("meta").textContent);
const OUTCOMES = {
  correct: ["✓", "correct"],
  wrong: ["✗", "wrong"],
  unparseable: ["?", "unparseable"],
  timed_out: ["…", "timed out"],
  grader_error: ["!", "grader error"],
};
const NO_VERDICT = ["timed_out", "grader_error"]; // whose rewards say nothing: no mean has them
const PER_RESPONSE = 1, PER_TOKEN = 2;
const at = (id) => document.getElementById(id);
const chunks = new Map();
const there = meta.steps.flatMap(({ step }, i) => (at(`texts-${step}`) ? [i] : [])); // indices of the steps with groups in the page
const state = { step: meta.steps[there.at(-1)].step, everywhere: false, text: "", outcomes: new Set(), lowest: null, highest: null, colour: "advantage" };
let shown = []; // [group, responses that match], in the page's order
let next = 0; // the first of them that is not an element yet
let turn = 0; // grows with every change: what an older one still waits for is dropped
let filling = false;
const highlight = window.CSS?.highlights ? new Highlight() : null;
highlight && CSS.highlights.set("found", highlight);

// ---- Small things

function make(tag, name = "", text = null) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== null) element.textContent = text;
  return element;
}

function number(value, digits = 2, sign = false) {
  if (value === null) return "not finite";
  const text = Math.abs(value).toFixed(digits);
  const zero = Number(text) === 0;
  return (value < 0 && !zero ? "−" : sign && !zero ? "+" : "") + text;
}

const count = (value) => value.toLocaleString("en");
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;

function figures(pairs) {
  return pairs.map(([name, value]) => {
    const pair = make("div");
    pair.append(make("dt", "", name), make("dd", "number", value));
    return pair;
  });
}

/** The content of a chunk, or null where the page has none of that name. */
function unpack(name) {
  if (!chunks.has(name)) {
    const element = at(name);
    chunks.set(name, element === null ? Promise.resolve(null) : inflate(element.textContent));
  }
  return chunks.get(name);
}

async function inflate(base64) {
  const binary = atob(base64), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// ---- Colours: a value a token (or a response), and how far along its scale that is

const exp = (x) => (x === null ? null : Math.exp(x));
/** Where the scale of the ratio's logarithm ends, above 0 or below it: where it is clipped, if it is. */
const ratioEnd = (log) => (meta.clip === null ? meta.difference_scale : log < 0 ? -Math.log(1 - meta.clip[0]) : Math.log(1 + meta.clip[1]));
const signed = (share) => [share < 0 ? "below" : "above", Math.min(1, Math.abs(share))];

const COLOURS = {
  none: { label: "nothing", needs: 0 },
  advantage: {
    label: "advantage",
    needs: PER_RESPONSE,
    shade: (response) => signed(response.advantage / meta.largest_advantage),
    legend: () => ["two", number(-meta.largest_advantage), `+${number(meta.largest_advantage)}`, "advantage of the response: its reward against those of its group"],
  },
  ratio: {
    label: "ratio",
    needs: PER_TOKEN,
    shade: (_, tokens, i) => {
      const log = tokens.difference[i];
      return log === null ? null : signed(log / ratioEnd(log));
    },
    legend: () => ["two", number(Math.exp(-ratioEnd(-1))), number(Math.exp(ratioEnd(1))), `probability when trained on over that when sampled; ${meta.clip === null ? "the scale ends at this run's 99th percentile" : "underlined: outside the clip range"}`],
  },
  difference: {
    label: "log-prob difference",
    needs: PER_TOKEN,
    shade: (_, tokens, i) => (tokens.difference[i] === null ? null : signed(tokens.difference[i] / meta.difference_scale)),
    legend: () => ["two", number(-meta.difference_scale), `+${number(meta.difference_scale)}`, "nats: log-prob when trained on, less that when sampled; the scale ends at this run's 99th percentile"],
  },
  log_prob: {
    label: "log-prob when sampled",
    needs: PER_TOKEN,
    shade: (_, tokens, i) => (tokens.log_prob[i] === null ? null : ["amount", Math.min(1, -tokens.log_prob[i] / 4)]),
    legend: () => ["one", "0", "−4", "nats: the stronger the colour, the less likely the token was"],
  },
  version: {
    label: "policy_version",
    needs: PER_RESPONSE,
    shade: (response, tokens, i) => {
      const [oldest, newest] = meta.versions;
      const version = tokens === null ? response.policy_version : tokens.version[i];
      return ["amount", newest === oldest ? 0.5 : 0.1 + (0.9 * (version - oldest)) / (newest - oldest)];
    },
    legend: () => ["one", meta.versions[0], meta.versions[1], meta.tokens ? "pushes before the token was sampled" : "pushes before the response's oldest token was sampled"],
  },
};

const available = (name) => COLOURS[name].needs < PER_TOKEN || meta.tokens;

function drawLegend() {
  const colour = COLOURS[state.colour];
  const legend = at("legend");
  legend.replaceChildren();
  if (colour.needs) {
    const [kind, low, high, words] = colour.legend();
    legend.append(make("span", "", low), make("span", `bar ${kind}`), make("span", "", high), make("span", "", words));
  }
  const here = !state.everywhere && at(`texts-${state.step}`) && !at(`tokens-${state.step}`);
  if (!meta.tokens || here)
    legend.append(make("span", "note", `This ${meta.tokens ? "step" : "run"} did not keep its rollouts' tokens: with logging.rollout_tokens=true they are coloured one by one, also by ratio and log-prob.`));
}

/** A response's text as elements, coloured as `state` says; `tokens` is null where the page has none. */
function coloured(response, tokens) {
  const colour = COLOURS[state.colour];
  const paint = (element, i) => {
    const shade = colour.needs ? colour.shade(response, tokens, i) : null;
    if (shade === null) return;
    element.classList.add(shade[0]);
    element.style.setProperty("--share", shade[1].toFixed(3));
  };
  const text = make("pre", "text");
  if (tokens === null) {
    const whole = make("span", "", response.response);
    if (colour.needs < PER_TOKEN) paint(whole, 0);
    text.append(whole);
    return text;
  }
  tokens.words.forEach((word, i) => {
    const token = make("span", "token", word);
    if (word === "") token.classList.add("part");
    if (word.includes("\n")) token.classList.add("newline");
    token.dataset.i = i;
    paint(token, i);
    if (state.colour === "ratio" && meta.clip !== null) {
      const ratio = exp(tokens.difference[i]);
      if (ratio !== null && (ratio < 1 - meta.clip[0] || ratio > 1 + meta.clip[1])) token.classList.add("beyond");
    }
    text.append(token);
  });
  text.described = [response, tokens];
  return text;
}

// ---- Groups

function responseElement(response, index, tokens) {
  const element = make("section", `response ${response.outcome}`);
  const [sign, word] = OUTCOMES[response.outcome];
  const head = make("header");
  head.append(make("span", "badge", `${sign} ${word}`));
  const numbers = make("dl", "figures");
  numbers.append(...figures([["reward", number(response.reward)], ["adv.", number(response.advantage, 2, true)]]));
  head.append(numbers);

  const text = coloured(response, tokens);
  const reading = make("footer", "reading");
  const read = make("span", "", response.parsed === null ? "no answer read" : "answer ");
  if (response.parsed !== null) read.append(make("code", "", response.parsed));
  reading.append(read);
  if (tokens !== null) reading.append(make("span", "", plural(tokens.words.length, "token")));
  const versions = tokens === null ? [response.policy_version] : [...new Set(tokens.version)];
  reading.append(make("span", "", versions.length === 1 ? `version ${versions[0]}` : `versions ${Math.min(...versions)}–${Math.max(...versions)}`));
  const terms = Object.entries(response.terms).filter(([, value]) => value !== 0);
  if (Object.keys(response.terms).length > 1)
    reading.append(make("span", "", terms.map(([name, value]) => `${name} ${number(value)}`).join(", ") || "no term earned"));
  if (response.note) reading.append(make("span", "note", response.note));
  element.append(head, text, reading);
  element.setAttribute("aria-label", `Response ${index + 1}`);
  return element;
}

function groupElement(group, matching, tokens) {
  const element = make("article", "group");
  element.tabIndex = -1;
  const rewards = group.responses.map((response) => response.reward);
  const judged = group.responses.filter((response) => !NO_VERDICT.includes(response.outcome)).map((response) => response.reward);
  const mean = judged.reduce((sum, reward) => sum + reward, 0) / judged.length;
  const spread = Math.sqrt(judged.reduce((sum, reward) => sum + (reward - mean) ** 2, 0) / Math.max(1, judged.length - 1));
  const right = group.responses.filter((response) => response.outcome === "correct").length;

  const head = make("header"), words = make("div"), numbers = make("dl", "figures");
  const expected = make("p", "expected", "expected ");
  expected.append(make("code", "", group.answer));
  words.append(make("p", "where", `Step ${group.step} · group ${group.group_id}`), make("h2", "prompt", group.prompt), expected);
  numbers.append(...figures([
    ["correct", `${right} of ${rewards.length}`],
    ["mean reward", judged.length ? number(mean) : "none"],
    ["std", judged.length ? number(spread) : "none"],
  ]));
  head.append(words, numbers);

  const grid = make("div", "responses");
  const order = rewards.map((_, i) => i).sort((i, j) => rewards[j] - rewards[i] || i - j);
  const add = (i) => grid.append(responseElement(group.responses[i], i, tokens === null ? null : tokens[i]));
  order.filter((i) => matching.has(i)).forEach(add);
  element.append(head, grid);
  const others = order.filter((i) => !matching.has(i));
  if (others.length) {
    const button = make("button", "others", `Show ${others.length} more that ${others.length === 1 ? "does" : "do"} not match`);
    button.addEventListener("click", () => {
      others.forEach(add);
      button.remove();
      fold(grid);
    });
    element.append(button);
  }
  return element;
}

/** Give a button to each text that is longer than its box. */
function fold(element) {
  const long = [...element.querySelectorAll(".text:not(.whole)")].filter(
    (text) => text.scrollHeight > text.clientHeight + 2 && !text.nextElementSibling.classList.contains("more"),
  );
  for (const text of long) {
    const button = make("button", "more", "Show all of it");
    button.addEventListener("click", () => {
      text.classList.add("whole");
      button.remove();
    });
    text.after(button);
  }
  mark(element);
}

// ---- Filtering

function matches(group, response, words) {
  if (state.outcomes.size && !state.outcomes.has(response.outcome)) return false;
  const reward = Math.fround(response.reward); // a sum that is shown as 0.3 may be 0.30000000000000004; older files have float32
  if (state.lowest !== null && reward < Math.fround(state.lowest)) return false;
  if (state.highest !== null && reward > Math.fround(state.highest)) return false;
  if (!words) return true;
  return [response.response, response.parsed ?? "", group.prompt, group.answer].some((text) => text.toLowerCase().includes(words));
}

async function refresh() {
  const mine = ++turn;
  write();
  const steps = state.everywhere ? meta.steps.map((step) => step.step) : [state.step];
  const groups = (await Promise.all(steps.map((step) => unpack(`texts-${step}`)))).flatMap((part) => part ?? []);
  if (mine !== turn) return;
  const words = state.text.toLowerCase();
  shown = [];
  let responses = 0;
  for (const group of groups) {
    const matching = new Set(group.responses.flatMap((response, i) => (matches(group, response, words) ? [i] : [])));
    if (matching.size) shown.push([group, matching]);
    responses += matching.size;
  }
  for (const chip of at("outcomes").children) {
    const graded = groups.flatMap((group) => group.responses).filter((response) => response.outcome === chip.value);
    chip.querySelector(".number").textContent = count(graded.length);
  }
  next = 0;
  highlight?.clear();
  at("groups").replaceChildren();
  const where = state.everywhere ? "in all steps" : `in step ${state.step}`;
  const cut = meta.rollouts < meta.all_rollouts ? `; the page has ${count(meta.rollouts)} of ${count(meta.all_rollouts)} responses, groups evenly spaced` : "";
  at("found").textContent = `${count(shown.length)} of ${plural(groups.length, "group")} ${where}, ${plural(responses, "response")}${filtered() ? ` that match${responses === 1 ? "es" : ""}` : ""}${cut}`;
  filling = false;
  await fill();
  performance.mark("shown");
}

const filtered = () => state.text || state.outcomes.size || state.lowest !== null || state.highest !== null;

/** Make elements of groups until those in view, and a screen more, are there. */
async function fill() {
  if (filling) return;
  filling = true;
  const mine = turn;
  while (next < shown.length && at("end").getBoundingClientRect().top < 2 * innerHeight) {
    const [group, matching] = shown[next];
    const tokens = meta.tokens ? await unpack(`tokens-${group.step}`) : null;
    if (mine !== turn) return;
    const element = groupElement(group, matching, tokens === null ? null : tokensOf(tokens, group.index));
    at("groups").append(element);
    fold(element);
    next++;
  }
  filling = false;
}

/** The tokens of the responses of a step's group `index`. */
function tokensOf(chunk, index) {
  return chunk.groups[index].map(({ words, ...columns }) => ({ words: words.map((word) => chunk.words[word]), ...columns }));
}

/** Mark what was searched for in the texts of `element`; ranges leave the tokens' elements as they are. */
function mark(element) {
  const words = state.text.toLowerCase();
  if (!words || !highlight) return;
  for (const text of element.querySelectorAll(".text, .prompt, code")) {
    const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
    const nodes = [], starts = [];
    let whole = "";
    while (walker.nextNode()) {
      nodes.push(walker.currentNode);
      starts.push(whole.length);
      whole += walker.currentNode.data.toLowerCase();
    }
    const place = (offset) => {
      const i = starts.findLastIndex((start) => start <= offset);
      return [nodes[i], Math.min(offset - starts[i], nodes[i].length)];
    };
    for (let from = whole.indexOf(words); from >= 0; from = whole.indexOf(words, from + words.length)) {
      const range = new Range();
      range.setStart(...place(from));
      range.setEnd(...place(from + words.length));
      highlight.add(range);
    }
  }
}

// ---- Steps

const stepIndex = () => meta.steps.findIndex((step) => step.step === state.step);

/** The index of a step with groups in the page, `by` steps from here or the next one in that direction, or the last. */
function beside(by) {
  const here = stepIndex(), wanted = here + by;
  if (by < 0) return there.findLast((i) => i <= wanted) ?? Math.min(here, there[0]);
  return there.find((i) => i >= wanted) ?? Math.max(here, there.at(-1));
}

function go(index) {
  const step = meta.steps[Math.max(0, Math.min(meta.steps.length - 1, index))].step;
  if (step === state.step && !state.everywhere) return;
  state.step = step;
  state.everywhere = false;
  scrollTo(0, 0);
  sync();
  refresh();
}

function drawTimeline() {
  const size = meta.steps.length, svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${size} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const gap = size > 200 ? 0 : 0.12;
  const bottoms = meta.steps.map(() => 100);
  for (const outcome of Object.keys(OUTCOMES)) {
    let path = "";
    meta.steps.forEach((step, i) => {
      const height = (100 * (step.outcomes[outcome] ?? 0)) / step.count;
      if (height) path += `M${i + gap / 2} ${bottoms[i]}h${1 - gap}v${-height}h${gap - 1}z`;
      bottoms[i] -= height;
    });
    const element = document.createElementNS(svg.namespaceURI, "path");
    element.setAttribute("class", outcome);
    element.setAttribute("d", path);
    svg.append(element);
  }
  const here = document.createElementNS(svg.namespaceURI, "rect");
  here.setAttribute("class", "here");
  here.setAttribute("id", "here");
  here.setAttribute("height", 100);
  here.setAttribute("width", 1);
  svg.append(here);
  at("timeline").append(svg);
  at("timeline").setAttribute("aria-valuemin", meta.steps[0].step);
  at("timeline").setAttribute("aria-valuemax", meta.steps.at(-1).step);
}

// ---- The page and `state`

/** Show `state` in the controls. */
function sync() {
  const index = stepIndex(), step = meta.steps[index];
  at("step").value = state.step;
  at("of").textContent = `of ${meta.steps.at(-1).step}`;
  at("previous").disabled = beside(-1) === index;
  at("following").disabled = beside(1) === index;
  at("of-step").replaceChildren(...figures([
    ["correct", `${number((100 * (step.outcomes.correct ?? 0)) / step.count, 1)}%`],
    ["mean reward", step.reward === null ? "none" : number(step.reward, 3)],
    ["responses", count(step.count)],
  ]));
  at("here").setAttribute("x", index);
  at("timeline").setAttribute("aria-valuenow", state.step);
  for (const [id, value] of [["search", state.text], ["lowest", state.lowest ?? ""], ["highest", state.highest ?? ""]])
    if (at(id) !== document.activeElement) at(id).value = value; // what is being typed may be half of a number
  at("everywhere").checked = state.everywhere;
  at("colour").value = state.colour;
  for (const chip of at("outcomes").children) chip.setAttribute("aria-pressed", state.outcomes.has(chip.value));
  drawLegend();
}

/** Keep `state` in the address, so that a link shows the same. */
function write() {
  const parts = { step: state.step, colour: state.colour };
  if (state.everywhere) parts.all = 1;
  if (state.text) parts.text = state.text;
  if (state.outcomes.size) parts.outcomes = [...state.outcomes].join(",");
  if (state.lowest !== null) parts.lowest = state.lowest;
  if (state.highest !== null) parts.highest = state.highest;
  history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
}

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const finite = (name) => (parts.has(name) && Number.isFinite(Number(parts.get(name))) ? Number(parts.get(name)) : null);
  if (meta.steps.some((step) => step.step === finite("step"))) state.step = finite("step");
  if (Object.hasOwn(COLOURS, parts.get("colour") ?? "") && available(parts.get("colour"))) state.colour = parts.get("colour");
  state.everywhere = parts.has("all");
  state.text = parts.get("text") ?? "";
  state.outcomes = new Set((parts.get("outcomes") ?? "").split(",").filter((outcome) => Object.hasOwn(OUTCOMES, outcome)));
  state.lowest = finite("lowest");
  state.highest = finite("highest");
}

function change(values) {
  Object.assign(state, values);
  sync();
  refresh();
}

let waiting = 0;
const soon = (values) => {
  clearTimeout(waiting);
  waiting = setTimeout(() => change(values()), 150);
};
const typed = (id) => (at(id).value === "" ? null : Number(at(id).value));
const clear = () => change({ text: "", outcomes: new Set(), lowest: null, highest: null, everywhere: false });

function nextTheme() {
  const themes = ["auto", "light", "dark"], root = document.documentElement;
  root.dataset.theme = themes[(themes.indexOf(root.dataset.theme) + 1) % 3];
  at("theme").textContent = `Theme: ${root.dataset.theme}`;
}

function nextColour() {
  const names = Object.keys(COLOURS).filter(available);
  change({ colour: names[(names.indexOf(state.colour) + 1) % names.length] });
}

/** Move the focus by `by` groups from the one in view. */
function walk(by) {
  const groups = [...at("groups").children];
  const top = document.querySelector(".walk").getBoundingClientRect().bottom;
  let here = groups.indexOf(document.activeElement.closest(".group"));
  if (here < 0) here = groups.findIndex((group) => group.getBoundingClientRect().bottom > top) - (by > 0 ? 1 : 0);
  const target = groups[Math.max(0, Math.min(groups.length - 1, here + by))];
  target?.focus({ preventScroll: true });
  target?.scrollIntoView();
}

const KEYS = {
  ArrowLeft: (event) => go(beside(event.shiftKey ? -10 : -1)),
  ArrowRight: (event) => go(beside(event.shiftKey ? 10 : 1)),
  j: () => walk(1),
  k: () => walk(-1),
  a: () => change({ everywhere: !state.everywhere }),
  c: nextColour,
  t: nextTheme,
  "/": () => at("search").focus(),
  "?": () => at("keys").showModal(),
  Escape: clear,
};

function pick(event) {
  const token = event.target.closest?.(".token");
  document.querySelector(".picked")?.classList.remove("picked");
  at("tip").hidden = !token;
  if (!token) return;
  token.classList.add("picked");
  const [response, tokens] = token.parentElement.described, i = Number(token.dataset.i);
  const value = (x) => number(x, 4);
  const head = make("code", "", JSON.stringify(tokens.words[i]));
  const list = make("dl");
  for (const [name, text] of [
    ["log-prob when sampled", value(tokens.log_prob[i])],
    ["when trained on", value(tokens.difference[i] === null ? null : tokens.log_prob[i] + tokens.difference[i])],
    ["difference", value(tokens.difference[i])],
    ["ratio", value(exp(tokens.difference[i]))],
    ["advantage", number(response.advantage, 3, true)],
    ["policy_version", String(tokens.version[i])],
  ])
    list.append(make("dt", "", name), make("dd", "number", text));
  at("tip").replaceChildren(head, list);
  const box = token.getBoundingClientRect(), tip = at("tip").getBoundingClientRect();
  const below = box.bottom + 8 + tip.height < innerHeight;
  at("tip").style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.width - 8))}px`;
  at("tip").style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - tip.height - 8)}px`;
}

function begin() {
  at("run").textContent = meta.run;
  at("facts").textContent = meta.facts.join(" · ");
  for (const [outcome, [sign, word]] of Object.entries(OUTCOMES)) {
    if (!meta.steps.some((step) => step.outcomes[outcome])) continue;
    const chip = make("button", outcome);
    chip.type = "button";
    chip.value = outcome;
    chip.append(make("span", "sign", sign), word, make("span", "number"));
    chip.addEventListener("click", () => {
      if (!state.outcomes.delete(outcome)) state.outcomes.add(outcome);
      change({});
    });
    at("outcomes").append(chip);
  }
  for (const [name, colour] of Object.entries(COLOURS)) {
    const option = make("option", "", colour.label);
    option.value = name;
    option.disabled = !available(name);
    at("colour").append(option);
  }
  const wide = matchMedia("(min-width: 641px)");
  at("filters").open = wide.matches;
  wide.addEventListener("change", () => (at("filters").open = wide.matches));
  drawTimeline();
  readAddress();
  sync();
  refresh();

  at("previous").addEventListener("click", () => go(beside(-1)));
  at("following").addEventListener("click", () => go(beside(1)));
  at("step").addEventListener("change", () => {
    const wanted = Number(at("step").value);
    go(meta.steps.findLastIndex((step) => step.step <= wanted));
    sync();
  });
  at("search").addEventListener("input", () => soon(() => ({ text: at("search").value })));
  for (const id of ["lowest", "highest"]) at(id).addEventListener("input", () => soon(() => ({ [id]: typed(id) })));
  at("everywhere").addEventListener("change", () => change({ everywhere: at("everywhere").checked }));
  at("colour").addEventListener("change", () => change({ colour: at("colour").value }));
  at("theme").addEventListener("click", nextTheme);
  at("help").addEventListener("click", () => at("keys").showModal());
  const jump = (event) => {
    const box = at("timeline").getBoundingClientRect();
    go(Math.floor(((event.clientX - box.left) / box.width) * meta.steps.length));
  };
  at("timeline").addEventListener("pointerdown", jump);
  at("timeline").addEventListener("pointermove", (event) => event.buttons && jump(event));
  document.addEventListener("pointerover", (event) => event.pointerType === "mouse" && pick(event));
  document.addEventListener("click", pick);
  document.addEventListener("scroll", () => fill(), { passive: true });
  addEventListener("resize", () => fill());
  addEventListener("hashchange", () => {
    document.activeElement.blur();
    readAddress();
    change({});
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || at("keys").open) return;
    const typing = event.target.matches("input:not([type=checkbox]), select");
    if (typing && event.key === "Escape") event.target.blur();
    if (typing || !Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key](event);
  });
}

begin();
