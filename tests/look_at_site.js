// In a browser: opens every page in frames of two widths, and writes what is wrong with it into the
// page: text or pictures beyond the edge that no box scrolls, code that breaks inside a word.
const WIDTHS = [1280, 390];

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

async function look(pages) {
  const frame = document.querySelector("iframe"), found = [];
  for (const width of WIDTHS) {
    frame.style.width = `${width}px`;
    for (const page of pages) {
      await new Promise((done) => { frame.onload = done; frame.src = page; });
      for (const fault of faultsOf(frame)) found.push(`${page} at ${width}: ${fault}`);
    }
  }
  document.body.textContent = JSON.stringify({looked: pages.length * WIDTHS.length, found});
}
