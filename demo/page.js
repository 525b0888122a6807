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

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.(".copy-answer");
  if (!button) return;
  const answers = button.closest(".arm").querySelectorAll('[data-testid="bot"]');
  await copied(answers[answers.length - 1].textContent.trim());
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy answer"), 1500);
});

// The line below a column names the bad words of its last answer; they are marked in the text without touching it.
const markBadWords = () => {
  if (!window.Highlight || !CSS.highlights) return;
  const ranges = [];
  for (const column of document.querySelectorAll("#columns .arm")) {
    const line = column.querySelector(".figures[data-bad-words]");
    const words = line ? JSON.parse(line.dataset.badWords) : [];
    const answers = column.querySelectorAll('[data-testid="bot"]');
    if (!words.length || !answers.length) continue;
    const texts = document.createTreeWalker(answers[answers.length - 1], NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const text = texts.currentNode.data.toLowerCase();
      for (const word of words) {
        for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
          const range = new Range();
          range.setStart(texts.currentNode, at);
          range.setEnd(texts.currentNode, at + word.length);
          ranges.push(range);
        }
      }
    }
  }
  CSS.highlights.set("bad-words", new Highlight(...ranges));
};

let marking = null;
new MutationObserver(() => {
  clearTimeout(marking);
  marking = setTimeout(markBadWords, 150);
}).observe(document, { childList: true, subtree: true, characterData: true });
