// Express + axios: parses the body, forwards it with X-Tenant-ID. No lock, no store, no order.
// TARGET=http://127.0.0.1:9000/hook PORT=9001 node bench/peers/express/server.js
const http = require("node:http");
const axios = require("axios");
const express = require("express");

const agent = new http.Agent({ keepAlive: true, maxSockets: 256 });
const app = express();
app.use(express.json({ limit: "8mb" }));

app.post("/webhook/waha", async (request, response) => {
  const headers = { "X-Tenant-ID": "2", "X-User-ID": request.body.payload.from };
  await axios.post(process.env.TARGET, request.body, { headers, httpAgent: agent });
  response.json({ status: "routed" });
});

app.listen(Number(process.env.PORT), "127.0.0.1");
