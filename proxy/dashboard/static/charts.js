// uPlot in the page's colours, as wide as its place.

const HEIGHT = 260;
const PHONE_HEIGHT = 200;

// What a CSS colour variable is now, as a canvas wants it.
export function colour(variable) {
  const probe = document.createElement("span");
  probe.style.color = `var(${variable})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

export const LINES = ["--line-1", "--line-2", "--line-3", "--line-4", "--line-5", "--line-6", "--line-7"];

// Draws into `place`, instead of what was there. `series` are uPlot's, with `stroke` left out: they get colours in turn.
export function draw(place, { x, series, data }) {
  const text = colour("--text");
  const grid = { stroke: colour("--rule"), width: 1 };
  const axis = (label, more = {}) => ({ label, stroke: text, grid, ticks: grid, font: "12px system-ui", labelFont: "12px system-ui", ...more });
  const drawn = series.map((each, place) => {
    const stroke = each.variable ? colour(each.variable) : colour(LINES[place % LINES.length]);
    const { variable, ...rest } = each;
    return { stroke, width: 2, ...rest, points: { size: 7, fill: stroke, stroke, ...rest.points } };
  });
  const options = {
    width: place.clientWidth || 600,
    height: innerWidth < 600 ? PHONE_HEIGHT : HEIGHT,
    scales: { x: { time: false } },
    axes: [axis(x.label, { incrs: x.incrs, values: (_, at) => at.map((value) => Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 9 })) }), axis(x.across, { size: 70 })],
    series: [{ label: x.label, value: x.value }, ...drawn],
    cursor: { drag: { x: false, y: false } },
    legend: { live: innerWidth >= 600 },
  };
  place.replaceChildren();
  return new uPlot(options, data, place);
}
