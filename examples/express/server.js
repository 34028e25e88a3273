// The agents' backend in Express, reduced to what it must do with a routed message: copy from here.
//
//   cd examples/express && npm install && PORT=8000 npm start
//
// It trusts X-Tenant-ID only if the signature covers it, and takes a message once, however often it
// comes. BACKEND_SIGNING_SECRET is the router's; empty means unsigned.
"use strict";

const crypto = require("node:crypto");
const express = require("express");

const SECRETS = (process.env.BACKEND_SIGNING_SECRET ?? "").split(",").filter(Boolean);
if (SECRETS.some((one) => Buffer.from(one.replace(/^whsec_/, ""), "base64").length < 24)) {
  console.error("BACKEND_SIGNING_SECRET: must be whsec_ and 24-64 bytes in base64");
  process.exit(1);
}
const OLDEST_SECONDS = 300; // a signature older than this is a replay
const REMEMBERED = 100_000; // idempotency keys; a real backend keeps them in its database

const app = express();
const done = new Set();

// The signature is of the very bytes: parse them afterwards.
app.post("/api/webhook/waha", express.raw({ type: () => true, limit: "8mb" }), (request, response) => {
  const tenant = Number(request.get("X-Tenant-ID"));
  const wrong = SECRETS.length > 0 && whyNotTrusted(request, tenant);
  if (wrong) {
    console.warn(`refused with 401: ${wrong}`);
    return response.status(401).json({ detail: wrong });
  }

  const key = request.get("Idempotency-Key");
  if (done.has(key)) return response.json({ status: "already done" });
  const message = JSON.parse(request.body.toString("utf8"));
  console.log(`🔀 Routed message for Tenant ${tenant}`);
  console.log(`   ${request.get("X-User-ID")}: ${message.payload.body ?? message.event}`);
  done.add(key);
  if (done.size > REMEMBERED) done.delete(done.values().next().value);
  return response.json({ status: "done" });
});

// Standard Webhooks 1.0. The signed id begins with the tenant.
function whyNotTrusted(request, tenant) {
  const id = request.get("webhook-id") ?? "";
  const sent = request.get("webhook-timestamp") ?? "";
  const given = (request.get("webhook-signature") ?? "").split(" ");
  if (!/^[0-9]+$/.test(sent) || Math.abs(Date.now() / 1000 - Number(sent)) > OLDEST_SECONDS) {
    return "not signed, or too old: webhook-timestamp is missing or not now";
  }
  const fits = SECRETS.some((secret) => {
    const key = Buffer.from(secret.replace(/^whsec_/, ""), "base64");
    const signed = Buffer.concat([Buffer.from(`${id}.${sent}.`), request.body]);
    const expected = Buffer.from(`v1,${crypto.createHmac("sha256", key).update(signed).digest("base64")}`);
    return given.some((one) => {
      const bytes = Buffer.from(one);
      return bytes.length === expected.length && crypto.timingSafeEqual(bytes, expected);
    });
  });
  if (!fits) return "webhook-signature does not match";
  return id.split("_")[0] === String(tenant) ? "" : "X-Tenant-ID is not the signed one";
}

const server = app.listen(Number(process.env.PORT ?? 8000), process.env.HOST ?? "127.0.0.1", (error) => {
  if (error) {
    console.error(`cannot listen: ${error.message}: stop what does, or set PORT`);
    process.exit(1);
  }
  const checked = SECRETS.length > 0 ? "checked" : "NOT checked: set BACKEND_SIGNING_SECRET";
  console.log(`listening on ${server.address().port}, signatures are ${checked}`);
});
