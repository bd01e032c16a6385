// A download's button is disabled while its file is made, and a disabled button loses the focus: Escape would reach no
// dialog any more, and Tab would begin at the top. The focus waits in the dialog, and goes back to the button.

const DOWNLOAD = '[data-testid="stDownloadButton"]'

function onFocusLost(event) {
  const button = event.target
  if (event.relatedTarget || !button.disabled || !button.closest(DOWNLOAD)) return
  const dialog = button.closest('[role="dialog"]')
  const wait = () => dialog?.focus({ preventScroll: true })
  setTimeout(wait) // not before the browser is done with this event
  const watch = new MutationObserver(() => {
    if (button.disabled) return
    watch.disconnect()
    if ([document.body, dialog].includes(document.activeElement)) button.focus({ preventScroll: true })
  })
  watch.observe(button, { attributeFilter: ["disabled"] })
}

if (!window.__conceptAuditFocus) {
  window.__conceptAuditFocus = true
  document.addEventListener("focusout", onFocusLost, true)
}

