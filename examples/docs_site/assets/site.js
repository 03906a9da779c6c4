// A button beside each block of code. Without scripts the page lacks the button and nothing else.
for (const block of document.querySelectorAll("pre")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.querySelector("code").textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select it and copy";  // the browser allows no access to the clipboard
    }
  });
  block.prepend(button);
}
