// Makes a container on an Azure Blob server: node container.js ENDPOINT ACCOUNT KEY CONTAINER
const crypto = require("crypto");
const [endpoint, account, key, container] = process.argv.slice(2);
const headers = { "x-ms-date": new Date().toUTCString(), "x-ms-version": "2021-08-06" };
const named = Object.entries(headers).map(([name, value]) => `${name}:${value}\n`).join("");
// Shared Key: verb, eleven empty headers, ours, and the resource, in which the emulator has the account twice.
const text = `PUT${"\n".repeat(12)}${named}/${account}/${account}/${container}\nrestype:container`;
const signature = crypto.createHmac("sha256", Buffer.from(key, "base64")).update(text).digest("base64");
headers.authorization = `SharedKey ${account}:${signature}`;
fetch(`${endpoint}/${account}/${container}?restype=container`, { method: "PUT", headers }).then(async (reply) => {
  if (reply.status !== 201) throw new Error(`${reply.status} ${await reply.text()}`);
});
