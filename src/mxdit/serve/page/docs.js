// The API, as the server describes it.

const ui = SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  validatorUrl: null, // another host
  onComplete() {
    const key = sessionStorage.getItem("mxdit-key"); // the page's
    if (key) ui.preauthorizeApiKey("key", key);
  },
});
