// The rollout browser. Data come from the page alone, and every text is set as textContent: a completion is never markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const controls = ["student", "beside", "outcome", "budget", "kind", "difficulty", "sort", "search"];
const list = byId("list");
let shown = []; // indices into data.rollouts, in the order of the list
let selected = null; // one of them

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function promptText(prompt) {
  return typeof prompt === "string" ? prompt : prompt.map((message) => `${message.role}: ${message.content}`).join("\n\n");
}

const problemOf = (rollout) => data.problems[rollout.problem];
const nats = (cost) => cost.toFixed(cost < 0.1 ? 3 : 2);
const sampleName = (rollout) => (rollout.greedy ? "greedy" : `sample ${rollout.sample}`);

// What the search looks in, once for each rollout.
const haystacks = data.rollouts.map((rollout) => {
  const problem = problemOf(rollout);
  return [promptText(problem.prompt), problem.answer, rollout.tokens.join("")].join("\n").toLowerCase();
});

const orders = {
  problem: () => 0, // as they are
  costly: (a, b) => (b.cost ?? -1) - (a.cost ?? -1),
  cheap: (a, b) => (a.cost ?? Infinity) - (b.cost ?? Infinity),
  long: (a, b) => b.tokens.length - a.tokens.length,
  early: (a, b) => (a.first ?? Infinity) - (b.first ?? Infinity) || 0, // Infinity - Infinity is no number
};

function matches(rollout, index) {
  const value = (name) => byId(name).value;
  const same = (wanted, actual) => wanted === "" || wanted === actual;
  return (
    same(value("student"), String(rollout.student)) &&
    same(value("outcome"), rollout.right ? "correct" : "wrong") &&
    same(value("budget"), rollout.within === undefined ? "" : rollout.within ? "within" : "over") &&
    same(value("kind"), rollout.greedy ? "greedy" : "sampled") &&
    same(value("difficulty"), problemOf(rollout).difficulty ?? "") &&
    haystacks[index].includes(value("search").trim().toLowerCase())
  );
}

function refreshList() {
  const order = orders[byId("sort").value] ?? orders.problem;
  shown = data.rollouts.map((_, index) => index).filter((index) => matches(data.rollouts[index], index));
  shown.sort((a, b) => order(data.rollouts[a], data.rollouts[b]) || a - b);
  byId("count").textContent = `${shown.length} of ${data.rollouts.length} rollouts`;
  list.replaceChildren(...shown.map(option));
  if (!shown.includes(selected)) selected = shown[0] ?? null;
  showSelected();
}

function option(index) {
  const rollout = data.rollouts[index];
  const row = element("li", rollout.within === false ? "over" : "");
  row.id = `rollout-${index}`;
  row.setAttribute("role", "option");
  row.append(
    element("span", "outcome", rollout.right ? "correct" : "wrong"),
    element("span", "excerpt", problemOf(rollout).excerpt),
    element("span", "cost", rollout.cost === undefined ? "" : nats(rollout.cost)),
    element("span", "whose", `problem ${rollout.problem}, ${data.students[rollout.student]}, ${sampleName(rollout)}`)
  );
  row.addEventListener("click", () => select(index));
  return row;
}

function select(index) {
  selected = index;
  showSelected();
  writeFragment();
}

function showSelected() {
  for (const row of list.querySelectorAll("[aria-selected=true]")) row.setAttribute("aria-selected", "false");
  const row = selected === null ? null : byId(`rollout-${selected}`);
  const detail = byId("detail");
  if (row === null) {
    list.removeAttribute("aria-activedescendant");
    detail.replaceChildren(element("p", "note", "No rollout matches."));
    return;
  }
  row.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", row.id);
  // Within the list alone: the page stays where it is.
  if (row.offsetTop < list.scrollTop) list.scrollTop = row.offsetTop;
  const below = row.offsetTop + row.offsetHeight - list.clientHeight;
  if (below > list.scrollTop) list.scrollTop = below;

  const rollout = data.rollouts[selected];
  const problem = problemOf(rollout);
  const facts = [`problem ${rollout.problem}`, problem.difficulty, `answer ${problem.answer}`].filter((fact) => fact !== null);
  const columns = element("div", "columns");
  columns.append(column(rollout));
  const beside = byId("beside").value;
  if (beside !== "" && beside !== String(rollout.student)) columns.append(besideColumn(rollout, Number(beside)));
  detail.replaceChildren(
    element("p", "facts", facts.join(" · ")),
    element("pre", "prompt", promptText(problem.prompt)),
    ...pictures(rollout.problem, problem.images),
    ...(problem.teacher_prompt === null ? [] : [teacherPrompt(problem.teacher_prompt)]),
    columns
  );
}

function pictures(number, images) {
  if (images.length === 0) return [];
  const row = element("div", "pictures");
  images.forEach((source, index) => {
    const image = element("img");
    image.src = source;
    image.alt = `Image ${index + 1} of ${images.length} in the prompt of problem ${number}`;
    row.append(image);
  });
  return [row];
}

function teacherPrompt(prompt) {
  const block = element("details", "teacher-prompt");
  block.append(element("summary", "", "What the teacher reads in its place"), element("pre", "prompt", promptText(prompt)));
  return block;
}

function besideColumn(rollout, student) {
  const other = data.rollouts.find(
    (one) =>
      one.student === student &&
      one.problem === rollout.problem &&
      one.greedy === rollout.greedy &&
      one.sample === rollout.sample
  );
  if (other) return column(other);
  const missing = element("article", "rollout");
  missing.append(
    element("h3", "", data.students[student]),
    element("p", "note", `No ${sampleName(rollout)} of this problem.`)
  );
  return missing;
}

function column(rollout) {
  const article = element("article", "rollout");
  const verdict = element("p", "verdict");
  verdict.append(
    element("span", "outcome", rollout.right ? "correct" : "wrong"),
    ` · ${sampleName(rollout)} · ${rollout.tokens.length} tokens${rollout.truncated ? ", truncated" : ""}`
  );
  if (rollout.cost !== undefined) {
    const sign = rollout.within ? "≤" : ">";
    const budget = element("span", rollout.within ? "" : "over", `cost ${nats(rollout.cost)} ${sign} ${data.limit}`);
    verdict.append(" · ", budget);
    if (rollout.within && rollout.first !== null) verdict.append(", over on the way");
  }
  const readout = element("p", "readout", " ");
  article.append(element("h3", "", data.students[rollout.student]), verdict, completion(rollout, readout), readout);
  return article;
}

function completion(rollout, readout) {
  const block = element("div", "completion");
  block.tabIndex = 0;
  block.setAttribute("role", "group");
  block.setAttribute("aria-label", `Completion of ${data.students[rollout.student]}; arrow keys go from token to token`);
  readout.setAttribute("aria-live", "polite");
  const tokens = rollout.tokens.map((text, place) => {
    const token = element("span", "token", text);
    const cost = rollout.costs?.[place];
    if (cost !== undefined) token.classList.add(`shade-${data.shades.filter((bound) => bound <= cost).length}`);
    if (rollout.first === place) token.classList.add("first");
    if (text.includes("\n")) token.classList.add("newline");
    if (text === "") token.classList.add("empty");
    return token;
  });
  block.append(...tokens);

  let current = -1;
  function point(place) {
    tokens[current]?.classList.remove("current");
    current = Math.min(Math.max(place, 0), tokens.length - 1);
    if (current < 0) return;
    tokens[current].classList.add("current");
    const cost = rollout.costs?.[current];
    const price = cost === undefined ? "" : `: ${cost} nats`;
    const mark = rollout.first === current ? ", here the prefix exceeds the limit" : "";
    readout.textContent = `token ${current + 1} of ${tokens.length} ${JSON.stringify(rollout.tokens[current])}${price}${mark}`;
  }
  block.addEventListener("pointerover", (event) => {
    const place = tokens.indexOf(event.target);
    if (place >= 0) point(place);
  });
  block.addEventListener("keydown", (event) => {
    const goal = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (goal === undefined) return;
    event.preventDefault();
    point(goal);
  });
  return block;
}

list.addEventListener("keydown", (event) => {
  const place = shown.indexOf(selected);
  const goal = {
    ArrowDown: place + 1,
    ArrowUp: place - 1,
    PageDown: place + 10,
    PageUp: place - 10,
    Home: 0,
    End: shown.length - 1,
  }[event.key];
  if (goal === undefined || shown.length === 0) return;
  event.preventDefault();
  select(shown[Math.min(Math.max(goal, 0), shown.length - 1)]);
});

// The view is in the fragment: #rollouts?student=1&budget=over&problem=3&...
function writeFragment() {
  const view = new URLSearchParams();
  for (const name of controls) if (byId(name).value !== byId(name).dataset.initial) view.set(name, byId(name).value);
  if (selected !== null) {
    const { student, problem, greedy, sample } = data.rollouts[selected];
    view.set("rollout", [student, problem, greedy ? "greedy" : sample].join("."));
  }
  const fragment = `#rollouts?${view}`;
  byId("link").href = fragment;
  history.replaceState(null, "", fragment);
}

function readFragment() {
  const [anchor, query] = location.hash.slice(1).split("?");
  if (anchor !== "rollouts" || query === undefined) return false;
  const view = new URLSearchParams(query);
  for (const name of controls) {
    const control = byId(name);
    control.value = view.get(name) ?? control.dataset.initial;
    if (control.selectedIndex === -1) control.value = control.dataset.initial; // no such choice
  }
  const [student, problem, which] = (view.get("rollout") ?? "").split(".");
  const found = data.rollouts.findIndex(
    (rollout) =>
      String(rollout.student) === student &&
      String(rollout.problem) === problem &&
      (rollout.greedy ? "greedy" : String(rollout.sample)) === which
  );
  selected = found === -1 ? null : found;
  return true;
}

for (const name of controls) {
  byId(name).dataset.initial = byId(name).value;
  byId(name).addEventListener("input", () => {
    if (name !== "beside") selected = null; // another list begins at its top
    refreshList();
    writeFragment();
  });
}
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("filters").addEventListener("reset", () =>
  // The event comes before the controls change.
  setTimeout(() => {
    selected = null;
    refreshList();
    writeFragment();
  })
);
addEventListener("hashchange", () => {
  if (readFragment()) refreshList();
});
const linked = readFragment();
refreshList();
if (linked) byId("rollouts").scrollIntoView();
