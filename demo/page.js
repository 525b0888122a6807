// What the page cannot do without a script of its own: save a text as a file, copy an answer, mark words in text.

window.saveText = (text, name) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

const copied = async (text) => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = Object.assign(document.createElement("textarea"), { value: text }); // pages without HTTPS have no clipboard
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
};

const answerOf = (line) => line.closest(".arm").querySelectorAll('[data-testid="bot"]')[line.dataset.answer];

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.(".copy-answer");
  if (!button) return;
  await copied(answerOf(button.closest("li")).textContent);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy answer"), 1500);
});

// Kept in the tab, so that a reload does not lose the conversation and another tab does not show it.
window.keepConversation = (text) => {
  text ? sessionStorage.setItem("conversation", text) : sessionStorage.removeItem("conversation");
};
window.keptConversation = () => sessionStorage.getItem("conversation") ?? "";

// The lines below a column name the bad words of its answers; they are marked in the text without touching it.
const markBadWords = () => {
  if (!window.Highlight || !CSS.highlights) return;
  const ranges = [];
  for (const line of document.querySelectorAll("#columns li[data-bad-words]")) {
    const words = JSON.parse(line.dataset.badWords).map((word) => word.replace(/[\\^$.*+?()[\]{}|\/-]/g, "\\$&"));
    const answer = answerOf(line);
    if (!words.length || !answer) continue;
    const pattern = new RegExp(`(?<![\\p{L}\\p{N}_])(?:${words.join("|")})(?![\\p{L}\\p{N}_])`, "giu");
    const texts = document.createTreeWalker(answer, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      for (const found of texts.currentNode.data.matchAll(pattern)) {
        const range = new Range();
        range.setStart(texts.currentNode, found.index);
        range.setEnd(texts.currentNode, found.index + found[0].length);
        ranges.push(range);
      }
    }
  }
  CSS.highlights.set("bad-words", new Highlight(...ranges));
};

// Three logs that stream at once would drown a screen reader: the status line speaks, and each log has its arm's name.
const nameColumns = () => {
  for (const column of document.querySelectorAll("#columns .arm")) {
    const log = column.querySelector('[role="log"]');
    const name = `conversation with ${column.querySelector('[data-testid="block-label"]')?.textContent.trim()}`;
    if (!log || log.getAttribute("aria-label") === name) continue;
    log.setAttribute("aria-label", name);
    log.setAttribute("aria-live", "off");
  }
};

let marking = null;
new MutationObserver(() => {
  clearTimeout(marking);
  marking = setTimeout(() => { markBadWords(); nameColumns(); }, 150);
}).observe(document, { childList: true, subtree: true, characterData: true });
