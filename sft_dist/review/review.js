"use strict";
const key = document.querySelector('meta[name="review-key"]').content;
const at = (id) => document.getElementById(id);
let pairs = [], place = 0, saving = false;

async function ask(path, body) {
  const given = { headers: { "X-Key": key } };
  if (body !== undefined) { given.method = "POST"; given.body = JSON.stringify(body); }
  const answer = await fetch(path, given);
  if (!answer.ok) throw new Error((await answer.text()) || "HTTP " + answer.status);
  return answer.json();
}

function tell(problem) {
  at("problem").textContent = problem;
  at("problem").hidden = !problem;
}

// Kana are Japanese alone; of Chinese characters the browser would choose forms of its own language.
function show(id, text) {
  at(id).textContent = text;
  at(id).lang = /[\u3040-\u30ff]/.test(text) ? "ja" : "";
}

function draw() {
  const done = pairs.filter((pair) => pair.choice).length;
  at("bar").value = done;
  if (!pairs.length) { tell("All answers are equal: there is nothing to choose."); return; }
  const pair = pairs[place];
  at("place").textContent = `${place + 1} of ${pairs.length}, ${done} looked at`;
  show("prompt", pair.prompt);
  show("left", pair.left);
  show("right", pair.right);
  show("reference", pair.reference || "");
  at("about-reference").hidden = !pair.reference;
  at("about-reference").open = false;
  for (const button of document.querySelectorAll("[data-choice]"))
    button.setAttribute("aria-pressed", String(button.dataset.choice === pair.choice));
  at("panel-left").dataset.chosen = String(pair.choice === "left");
  at("panel-right").dataset.chosen = String(pair.choice === "right");
  at("review").hidden = false;
}

async function choose(choice) {
  if (saving) return; // a second key is meant for the next pair, which is not there yet
  const pair = pairs[place];
  saving = true;
  try {
    await ask("/choose", { pair: pair.id, choice });
  } catch (error) {
    tell("Not saved: " + error.message);
    return;
  } finally {
    saving = false;
  }
  tell("");
  pair.choice = choice;
  if (choice) {
    const next = pairs.findIndex((each, number) => number > place && !each.choice);
    const open = next >= 0 ? next : pairs.findIndex((each) => !each.choice);
    if (open < 0) { draw(); await end(); return; }
    place = open;
  }
  draw();
}

function move(by) {
  if (saving) return;
  place = Math.min(Math.max(place + by, 0), pairs.length - 1);
  draw();
}

function line(text, strong) {
  const made = document.createElement(strong ? "b" : "p");
  made.textContent = text;
  at("result").append(made);
}

const percent = (share) => (100 * share).toFixed(0) + " %";

async function end() {
  let found;
  try { found = await ask("/result"); } catch (error) { tell(error.message); return; }
  at("result").replaceChildren();
  const [first, second] = found.names;
  if (found.share) {
    const [share, low, high] = found.share;
    line(`${second} is better in ${percent(share)} of the decided pairs`, true);
    line(`95 % interval ${percent(low)} to ${percent(high)}; of nothing such a difference comes with a chance of ${found.chance.toPrecision(2)} (sign test)`);
  } else line("No pair is decided", true);
  line(`${second} better: ${found.second}, ${first} better: ${found.first}, both good: ${found.tie}, neither good: ${found.bad}, not looked at: ${found.open}`);
  line("You know now whose answers are whose in sum, not in each pair; what you chose is saved. You may go on or close this page.");
  at("result").hidden = false;
  at("result").focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || at("review").hidden) return;
  const choices = { 1: "left", 2: "tie", 3: "bad", 4: "right" };
  if (event.key in choices) choose(choices[event.key]);
  else if (event.key === "ArrowLeft") move(-1);
  else if (event.key === "ArrowRight") move(1);
  else if (event.key === "u") choose(null);
  else if (event.key === "r") at("about-reference").open = !at("about-reference").open;
  else if (event.key === "e") end();
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => choose(button.dataset.choice));
at("end").addEventListener("click", end);

ask("/state").then((state) => {
  pairs = state.pairs;
  const open = pairs.findIndex((pair) => !pair.choice);
  place = open < 0 ? 0 : open;
  draw();
}).catch((error) => tell(error.message));
