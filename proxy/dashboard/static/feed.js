// What the proxy says, as it says it: the entries that were closed, what was found out about them later, sums over all
// requests, and the nodes every second.

import { events, json, request } from "./api.js";

export const LIMIT = 500;
const SILENCE_MS = 10_000;
const RETRY_MS = 1_000;
const LONGEST_RETRY_MS = 10_000;

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Calls on.entries(list, newest last), on.found({seq, ...changes}), on.totals(sums), on.nodes(view) and
// on.state("live" | "lost", why) until the page closes.
export async function follow(on) {
  let lastId = 0;
  let retryMs = RETRY_MS;
  let began = false;
  let away = false;
  for (;;) {
    const stop = new AbortController();
    let watchdog = null;
    try {
      if (!began) {
        const { entries } = await json(`/ledger?last=${LIMIT}`);
        on.entries(entries);
        lastId = entries.at(-1)?.seq ?? 0;
        began = true;
      } else if (away) {
        // What was found out meanwhile is not told again.
        const { entries } = await json(`/ledger?last=${LIMIT}`);
        for (const { seq, closed_at, regret_ns, parity_kl } of entries) on.found({ seq, closed_at, regret_ns, parity_kl });
      }
      away = true;
      const headers = { "Last-Event-ID": String(lastId) };
      const answer = await request("/events", { headers, signal: stop.signal });
      if (!answer.ok) throw new Error(`/events: ${answer.status}`);
      on.state("live");
      retryMs = RETRY_MS;
      const alive = () => {
        clearTimeout(watchdog);
        watchdog = setTimeout(() => stop.abort(), SILENCE_MS);
      };
      alive();
      for await (const { event, data, id } of events(answer)) {
        alive();
        if (event === "entry") {
          lastId = id ?? lastId;
          on.entries([JSON.parse(data)]);
        } else if (["nodes", "totals", "found"].includes(event)) {
          on[event](JSON.parse(data));
        }
      }
      on.state("lost", "the proxy ended the stream");
    } catch (error) {
      on.state("lost", error.message);
    } finally {
      clearTimeout(watchdog);
    }
    await pause(retryMs);
    retryMs = Math.min(retryMs * 2, LONGEST_RETRY_MS);
  }
}
