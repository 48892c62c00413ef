// Browsers start no workers for a page that was opened from a disk. There a hidden frame does the work of one, so that
// search needs no server.
if (location.protocol === "file:") {
  const load = (page, url) => new Promise((done, fail) => {
    const script = page.createElement("script");
    Object.assign(script, { src: url, onload: done, onerror: fail });
    page.body.append(script);
  });

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inner.importScripts = (...urls) =>
        urls.reduce((before, next) => before.then(() => load(inner.document, next)), Promise.resolve());
      this.ready = load(inner.document, url);
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
