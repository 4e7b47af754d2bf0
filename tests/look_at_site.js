// In a browser: opens every page in frames of two widths, and writes what is wrong with it into the
// page: text or pictures beyond the edge that no box scrolls, code that breaks inside a word, and
// what is hard to read, light or dark.
const WIDTHS = [1280, 390];
const THEMES = ["light", "dark"];
const CONTRAST = 4.5, OF_LARGE = 3;  // WCAG 2.1, 1.4.3; large: from 24 pixels on, bold from 18.66

function scrolls(element, article) {
  for (let e = element; e && e !== article; e = e.parentElement) {
    if (["auto", "scroll"].includes(getComputedStyle(e).overflowX)) return true;
  }
  return false;
}

function piecesOf(text) {  // words; long paths may break behind a slash or a double colon
  const pieces = [];
  for (const found of text.matchAll(/(?:[^\s/:]|:(?!:))+(?:\/|::)?|[/:]+/g)) {
    pieces.push([found.index, found.index + found[0].length]);
  }
  return pieces;
}

function isBroken(node, document) {
  for (const [first, last] of piecesOf(node.data)) {
    const range = document.createRange();
    range.setStart(node, first);
    range.setEnd(node, last);
    const tops = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
    if (tops.size > 1) return node.data.slice(first, last);
  }
  return "";
}

function faultsOf(frame) {
  const page = frame.contentDocument, width = frame.contentWindow.innerWidth;
  const article = page.querySelector("article"), faults = [];
  if (page.documentElement.scrollWidth > width) faults.push("scrolls sideways");
  const contents = page.querySelector(".sidebar-scroll");
  if (contents && contents.scrollWidth > contents.clientWidth) faults.push("contents scroll sideways");
  for (const element of article.querySelectorAll("*")) {
    const beyond = element.getBoundingClientRect().right > width + 1;
    if (beyond && !scrolls(element, article)) {
      faults.push(`runs off: ${element.tagName} ${element.textContent.slice(0, 60)}`);
    }
  }
  for (const code of article.querySelectorAll("code, pre")) {
    const walker = page.createTreeWalker(code, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const word = isBroken(walker.currentNode, page);
      if (word) faults.push(`breaks: ${word}`);
    }
  }
  return faults;
}

function channels(colour) {  // red, green, blue, alpha
  const found = colour.match(/[\d.]+/g).map(Number);
  return found.length > 3 ? found : [...found, 1];
}

function luminance(colour) {
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [red, green, blue] = channels(colour).map(linear);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function groundOf(element) {  // the nearest opaque background
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (channels(colour)[3] === 1) return colour;
  }
  return "rgb(255, 255, 255)";
}

function hardToRead(page) {
  const faults = new Set(), walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
    if (style.visibility === "hidden" || style.opacity === "0") continue;
    const [a, b] = [style.color, groundOf(element)].map(luminance);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const least = size >= 24 || (bold && size >= 18.66) ? OF_LARGE : CONTRAST;
    const what = `${style.color} on ${groundOf(element)}`;
    if (contrast < least) faults.add(`hard to read, ${contrast.toFixed(1)}: ${what}`);
  }
  return [...faults];
}

async function look(pages) {
  const frame = document.querySelector("iframe"), found = [];
  for (const width of WIDTHS) {
    frame.style.width = `${width}px`;
    for (const page of pages) {
      await new Promise((done) => { frame.onload = done; frame.src = page; });
      for (const fault of faultsOf(frame)) found.push(`${page} at ${width}: ${fault}`);
      for (const theme of THEMES) {
        frame.contentDocument.body.dataset.theme = theme;
        const faults = hardToRead(frame.contentDocument);
        for (const fault of faults) found.push(`${page} at ${width}, ${theme}: ${fault}`);
      }
    }
  }
  document.body.textContent = JSON.stringify({looked: pages.length * WIDTHS.length, found});
}
