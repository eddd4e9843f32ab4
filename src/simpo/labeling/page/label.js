// The label page. Text from models and datasets is inserted as text, never as HTML.

const query = new URLSearchParams(location.search);
const token = query.get("token");
const PENDING = "simpo-label-pending"; // storage key of a request the server has not confirmed; survives a reload
const $ = (id) => document.getElementById(id);

let labeler = query.get("labeler");
let item = null; // the item on the screen
let ranking = []; // groups of equally good answers (their indices), from best to worst
let tieNext = false; // whether the next answer joins the last group
let busy = false; // whether a request is in flight
let clock = { seconds: 0, since: null }; // how long the item has been visible

// ---- Requests. A request is repeated until the server responds; its key makes it count once.

async function send(action, body) {
  for (;;) {
    let response, reply;
    try {
      response = await fetch(`/api/${action}`, {
        method: "POST",
        headers: { "content-type": "application/json", "x-simpo-token": token },
        body: JSON.stringify(body),
      });
      reply = await response.text(); // the connection may also break here
    } catch {
      report("The server is not responding. Nothing is lost: your request is sent again until it does.");
      await new Promise((resolve) => setTimeout(resolve, 500));
      continue;
    }
    const found = parsed(reply);
    if (response.ok && found) {
      report("");
      return found;
    }
    report(found?.error ?? `Server error (${response.status}). Try again; if it persists, restart simpo label.`);
    return null;
  }
}

function parsed(reply) {
  try {
    return JSON.parse(reply);
  } catch {
    return null; // not from our API, for example the text of an internal server error
  }
}

async function act(action, body) {
  if (busy) return;
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    const kept = { action, body: { labeler, ...body } };
    if (action !== "next") sessionStorage.setItem(PENDING, JSON.stringify(kept));
    const found = await send(kept.action, kept.body);
    sessionStorage.removeItem(PENDING);
    if (found) show(found);
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

function report(text) {
  $("status").textContent = text;
  $("status").hidden = !text;
}

// ---- The item on the screen.

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function text(content) {
  return content.trim()
    ? element("div", { className: "text", dir: "auto", textContent: content })
    : element("div", { className: "text empty", textContent: "(empty)" });
}

function show(found) {
  item = found.item;
  ranking = [];
  tieNext = false;
  showProgress(found.progress);
  $("start").hidden = true;
  $("task").hidden = $("actions").hidden = !item;
  $("done").hidden = Boolean(item);
  if (!item) {
    const { done, judged_items, items } = found.progress;
    $("summary").textContent =
      `You have judged ${done} items. ${judged_items} of ${items} items have been judged. You can close this page.`;
    return;
  }
  const several = item.answers.length > 2;
  $("question").textContent = several ? "Rank the answers, best first." : "Which answer is better?";
  $("prompt").replaceChildren(...item.prompt.map(shownMessage), ...shownTools());
  $("answers").className = ["", "", "two", "three"][item.answers.length] ?? "more";
  $("answers").replaceChildren(...item.answers.map(shownAnswer));
  $("note").value = found.note ?? "";
  document.activeElement.blur();
  showActions();
  scrollTo(0, 0);
  clock = { seconds: 0, since: document.hidden ? null : performance.now() };
}

function shownMessage(message) {
  const parts = item.prompt.length > 1 ? [element("span", { className: "role", textContent: message.role })] : [];
  return element("div", { className: "message" }, ...parts, text(message.content));
}

function shownTools() {
  if (!item.tools) return [];
  const role = element("span", { className: "role", textContent: "tools" });
  return [element("div", { className: "message" }, role, text(JSON.stringify(item.tools, null, 2)))];
}

function shownAnswer(content, index) {
  const title = element("h2", { textContent: `Answer ${index + 1}` });
  const shown = text(content);
  shown.tabIndex = 0; // makes a long answer scrollable from the keyboard
  shown.setAttribute("role", "region");
  shown.setAttribute("aria-label", `Answer ${index + 1}`);
  const made = element("section", { className: "answer" }, title, shown);
  title.onclick = () => choose(index);
  return made;
}

function showProgress({ done, left, pace, items, judged_items, labelers }) {
  const parts = [labeler, `${done} done`, left ? `${left} left` : ""];
  if (pace !== null && left) parts.push(`${duration(pace)} each`, `about ${duration(pace * left)} to go`);
  if (labelers > 1) parts.push(`all ${labelers} labelers: ${judged_items} of ${items}`);
  $("progress").textContent = parts.filter(Boolean).join(" · ");
  $("fill").style.width = `${(100 * done) / Math.max(1, done + left)}%`;
}

function duration(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// ---- Actions of keys and buttons.

const BETTER = [
  { keys: ["ArrowLeft", "1"], sign: "←", label: "1 is better", meaning: "Answer 1 is better", run: () => choose(0) },
  { keys: ["ArrowRight", "2"], sign: "→", label: "2 is better", meaning: "Answer 2 is better", run: () => choose(1) },
];
const COMMON = {
  tie: { keys: ["t", "0"], sign: "T", label: "Tie", meaning: "Equally good", run: () => judge("tie", same()) },
  bad: { keys: ["b"], sign: "B", label: "Both bad", meaning: "None is acceptable", run: () => judge("both_bad", same()) },
  skip: { keys: ["s"], sign: "S", label: "Skip", meaning: "I cannot judge this", run: () => judge("skip", same()) },
  note: { keys: ["n"], sign: "N", label: "Note", meaning: "Write a note", run: () => $("note").focus() },
  undo: { keys: ["u", "z"], sign: "U", label: "Undo", meaning: "Undo the last judgment", run: undo },
};
const RANKING = [
  { keys: ["="], sign: "=", label: "Equal", meaning: "The next answer ties with the last", run: joinNext },
  { keys: ["Backspace"], sign: "⌫", label: "Remove", meaning: "Remove the last answer", run: removeLast },
  { keys: ["Enter"], sign: "↵", label: "Submit", meaning: "Store the ranking", strong: true, run: submit },
];

function actions() {
  const { tie, bad, skip, note, undo: back } = COMMON;
  if (item.answers.length === 2) return { major: [BETTER[0], tie, bad, BETTER[1]], minor: [skip, note, back] };
  const numbers = item.answers.map((_, index) => ({
    keys: [String(index + 1)], sign: String(index + 1), meaning: `Rank answer ${index + 1} next`, run: () => choose(index),
  }));
  return { major: [...RANKING, { ...bad, label: "All bad" }], minor: [skip, note, back], hidden: numbers };
}

function showActions() {
  const { major, minor } = actions();
  const button = ({ label, sign, strong, run }) =>
    element("button", { type: "button", className: strong ? "strong" : "", onclick: run },
      label, element("kbd", { textContent: sign }));
  const less = minor.map(button);
  less.forEach((one) => (one.className = "quiet"));
  $("actions").replaceChildren(...major.map(button), element("div", { className: "minor" }, ...less));
}

const same = () => item.answers.map(() => 1);

function choose(index) {
  if (busy) return;
  if (item.answers.length === 2) {
    mark([[index]]);
    judge("ranked", index ? [2, 1] : [1, 2]);
    return;
  }
  if (ranking.flat().includes(index)) return;
  if (tieNext && ranking.length) ranking.at(-1).push(index);
  else ranking.push([index]);
  tieNext = false;
  mark(ranking);
}

function joinNext() {
  tieNext = ranking.length > 0;
}

function removeLast() {
  tieNext = false;
  ranking.at(-1)?.pop();
  if (ranking.length && !ranking.at(-1).length) ranking.pop();
  mark(ranking);
}

function submit() {
  const missing = item.answers.map((_, index) => index).filter((index) => !ranking.flat().includes(index));
  if (missing.length > 1) {
    report(`Rank ${missing.length - 1} more: press the numbers of the answers, best first.`);
    return;
  }
  const groups = missing.length ? [...ranking, missing] : ranking;
  const ranks = item.answers.map((_, index) => 1 + groups.findIndex((group) => group.includes(index)));
  judge(groups.length > 1 ? "ranked" : "tie", ranks);
}

function mark(groups) {
  report("");
  [...$("answers").children].forEach((made, index) => {
    const rank = groups.findIndex((group) => group.includes(index));
    made.classList.toggle("chosen", rank >= 0);
    made.querySelector(".rank")?.remove();
    if (rank >= 0 && item.answers.length > 2) {
      made.querySelector("h2").append(element("span", { className: "rank", textContent: `Rank ${rank + 1}` }));
    }
  });
}

function judge(kind, ranks) {
  const seconds = clock.seconds + (clock.since === null ? 0 : (performance.now() - clock.since) / 1000);
  act("judge", { key: crypto.randomUUID(), item: item.id, kind, ranks, note: $("note").value, seconds });
}

function undo() {
  act("undo", { key: crypto.randomUUID() });
}

function openGuidelines() {
  const { major, minor, hidden = [] } = item ? actions() : { major: BETTER, minor: Object.values(COMMON) };
  const rows = [...hidden, ...major, ...minor].flatMap(({ sign, meaning }) => [
    element("dt", {}, element("kbd", { textContent: sign })),
    element("dd", { textContent: meaning }),
  ]);
  $("keys").replaceChildren(...rows, element("dt", {}, element("kbd", { textContent: "↑↓" })),
    element("dd", { textContent: "Scroll the answers together" }));
  $("guidelines").showModal();
}

// ---- Keys, clock, start.

document.addEventListener("keydown", (event) => {
  const writing = /^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (writing && event.key === "Escape") document.activeElement.blur();
  if (writing || $("guidelines").open || event.altKey || event.repeat) return;
  if ((event.ctrlKey || event.metaKey) && event.key !== "z") return;
  if (event.key === "Enter" && document.activeElement.tagName === "BUTTON") return; // Enter presses that button
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "g" || key === "?") {
    openGuidelines();
  } else if (item && (key === "ArrowUp" || key === "ArrowDown")) {
    const by = key === "ArrowDown" ? 80 : -80;
    document.querySelectorAll(".answer .text").forEach((one) => one.scrollBy({ top: by }));
  } else {
    const known = item ? Object.values(actions()).flat() : $("start").hidden ? [COMMON.undo] : [];
    const found = known.find(({ keys }) => keys.includes(key));
    if (!found) return;
    found.run();
  }
  event.preventDefault();
});

document.addEventListener("visibilitychange", () => {
  if (document.hidden && clock.since !== null) {
    clock = { seconds: clock.seconds + (performance.now() - clock.since) / 1000, since: null };
  } else if (!document.hidden) {
    clock.since = performance.now();
  }
});

async function begin(name) {
  labeler = name;
  query.set("labeler", labeler);
  history.replaceState(null, "", `?${query}`); // so that a reload keeps the labeler
  const kept = JSON.parse(sessionStorage.getItem(PENDING) ?? "null");
  if (kept && kept.body.labeler === labeler) await send(kept.action, kept.body);
  sessionStorage.removeItem(PENDING);
  await act("next", {});
}

$("start").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("labeler").value.trim();
  if (name) begin(name);
});
$("open-guidelines").addEventListener("click", openGuidelines);
document.querySelector("[data-action=undo]").addEventListener("click", undo);

const opened = await send("guidelines", {});
if (opened) {
  document.querySelectorAll(".guidelines").forEach((place) => (place.textContent = opened.guidelines));
  if (labeler) {
    await begin(labeler);
  } else {
    $("start").hidden = false;
    $("labeler").focus();
  }
}
