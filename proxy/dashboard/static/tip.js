// One tooltip for all bars; what it says is also the bar's label, for those who do not see it.

import { find, make } from "./dom.js";

const GAP = 8;

export function show(anchor, lines) {
  const tip = find("tip");
  tip.replaceChildren(...lines.map((line) => make("div", {}, line)));
  tip.hidden = false;
  const at = anchor.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(at.left, GAP), innerWidth - size.width - GAP);
  const below = at.bottom + GAP;
  const top = below + size.height < innerHeight ? below : at.top - size.height - GAP;
  tip.style.left = `${Math.max(left, GAP)}px`;
  tip.style.top = `${Math.max(top, GAP)}px`;
}

export function hide() {
  find("tip").hidden = true;
}
