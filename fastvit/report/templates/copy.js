"use strict";
// Add a copy button to each code block. Without scripts there is no button, and the text can still be selected.
for (const code of document.querySelectorAll(".copy code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy: " + code.textContent.split("\n")[0]);
  const status = document.getElementById("copy-status");
  button.addEventListener("click", async () => {
    let copied = true;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      // Browsers that deny local files access to the clipboard still copy the selection.
      getSelection().selectAllChildren(code);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Select and copy";
    status.textContent = copied ? "Copied." : "The text is selected; copy it with the keyboard.";
    setTimeout(() => {
      button.textContent = "Copy";
      status.textContent = "";
    }, 2000);
  });
  code.closest(".copy").append(button);
}
