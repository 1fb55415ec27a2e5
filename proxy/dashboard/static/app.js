// The page: hands what the feed says to the views, a frame at a time.

import { askForKey, json } from "./api.js";
import { find } from "./dom.js";
import { renewEntry } from "./entry.js";
import { LIMIT, follow } from "./feed.js";
import { Nodes } from "./nodes.js";
import { setUpTheme } from "./theme.js";
import { TryIt } from "./try.js";
import { Waterfall } from "./waterfall.js";
import { Worth } from "./worth.js";

const VIEWS = ["waterfall", "worth", "nodes", "try"];

const waterfall = new Waterfall();
const worth = new Worth();
const nodes = new Nodes();
const tryIt = new TryIt();

let all = [];
let added = [];
let scheduled = false;

function draw() {
  const fresh = added;
  scheduled = false;
  added = [];
  all = all.concat(fresh).slice(-LIMIT);
  waterfall.take(all, fresh);
  worth.take(all);
  nodes.take(all);
}

function say(state, why = "") {
  const pill = find("connection");
  pill.dataset.state = state;
  pill.textContent = state === "lost" ? "lost, trying again" : state;
  pill.title = why;
}

function turnTo(view) {
  for (const each of VIEWS) {
    find(`view-${each}`).hidden = each !== view;
    const link = document.querySelector(`nav a[href="#${each}"]`);
    if (each === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  worth.seen(view === "worth");
}

function turnToHash() {
  const asked = location.hash.slice(1);
  if (asked === "content") return;
  turnTo(VIEWS.includes(asked) ? asked : VIEWS[0]);
}

addEventListener("hashchange", turnToHash);
turnToHash();
setUpTheme(() => worth.redraw());
find("key").hidden = !sessionStorage.getItem("isthmus-api-key");
find("key").addEventListener("click", () => askForKey());

// Numbers begin again where a proxy without a file was started again: the newest entry is meant, or the one of that time.
function found({ seq, closed_at, ...changes }) {
  const isMeant = (entry) => entry.seq === seq && (!closed_at || entry.closed_at === closed_at);
  const entry = added.findLast(isMeant) ?? all.findLast(isMeant);
  if (!entry || Object.entries(changes).every(([name, value]) => entry[name] === value)) return;
  Object.assign(entry, changes);
  waterfall.renew(entry);
  renewEntry(entry);
  worth.take(all);
}

follow({
  found,
  totals: (sums) => worth.totals(sums),
  entries(list) {
    // In a tab that nobody sees no frame comes, and this must not grow.
    added = added.concat(list).slice(-LIMIT);
    if (!scheduled) requestAnimationFrame(draw);
    scheduled = true;
  },
  nodes(view) {
    nodes.show(view);
    say("live");
  },
  state(state, why) {
    say(state, why);
    if (state === "lost") nodes.lost();
    else if (!tryIt.model) introduce();
  },
});

// What does not change while the proxy runs; asked again when somebody has given a key after all.
function introduce() {
  json("/v1/models")
    .then(({ data }) => {
      find("model").textContent = data[0].id;
      document.title = `Isthmus: ${data[0].id}`;
      tryIt.model = data[0].id;
    })
    .catch((error) => say("lost", error.message));
  json("/dashboard/measured")
    .then(({ crossover, link }) => {
      worth.showCrossover(crossover);
      nodes.measured(link);
    })
    .catch(() => {});
}
introduce();
