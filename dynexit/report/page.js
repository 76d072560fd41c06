"use strict";
for (const command of document.querySelectorAll(".command")) {
  const button = document.createElement("button");
  button.textContent = "copy";
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(command);
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "copied";
    } catch {
      button.textContent = document.execCommand("copy") ? "copied" : "selected";
    }
  });
  command.previousElementSibling.append(button);
}
const cards = document.querySelectorAll("[data-budget]");
if (cards.length > 1) {
  const choice = document.createElement("select");
  choice.setAttribute("aria-label", "budget");
  choice.append(new Option("all budgets", ""), ...Array.from(cards, (card) => new Option(card.dataset.budget)));
  choice.addEventListener("change", () => {
    for (const card of cards) card.hidden = choice.value !== "" && choice.value !== card.dataset.budget;
  });
  document.getElementById("budgets").before(choice);
}
