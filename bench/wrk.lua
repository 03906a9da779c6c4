-- What wrk sends, and the one line it reports. Called by load.py as
--   wrk ... -s wrk.lua URL -- KIND SEED [...]
-- KIND "plain" leaves wrk's own static request alone, so the client is as light as it can be.

local counter = 0

-- Thirteen headers, Host included. Path, query, cookie, referer, agent, and language differ from one request to
-- the next and never repeat within a run: parts from a pool, joined around a running number.
local function browser_requests(seed)
  math.randomseed(seed)
  local languages = { "en-US,en;q=0.9", "de-DE,de;q=0.9,en;q=0.7", "fr-FR,fr;q=0.8", "ja-JP,ja;q=0.9,en;q=0.6" }
  local platforms = { '"Windows"', '"macOS"', '"Linux"', '"Android"' }
  local words = { "books", "news", "garden", "cameras", "travel", "music", "kitchen", "weather" }
  local pool = {}
  for i = 1, 256 do
    local version = math.random(100, 140)
    local word = words[math.random(#words)]
    pool[i] = {
      "GET /" .. word .. "/" .. math.random(1e6) .. "/item-",
      "?page=" .. math.random(99) .. "&sort=price HTTP/1.1\r\n"
        .. "Host: " .. wrk.host .. ":" .. wrk.port .. "\r\n"
        .. "Connection: keep-alive\r\n"
        .. 'sec-ch-ua: "Chromium";v="' .. version .. '", "Not=A?Brand";v="24"\r\n'
        .. "sec-ch-ua-mobile: ?" .. math.random(0, 1) .. "\r\n"
        .. "sec-ch-ua-platform: " .. platforms[math.random(#platforms)] .. "\r\n"
        .. "Upgrade-Insecure-Requests: 1\r\n"
        .. "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/"
        .. version .. ".0." .. math.random(9999) .. ".0 Safari/537.36\r\n"
        .. "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8\r\n"
        .. "Sec-Fetch-Mode: navigate\r\n"
        .. "Referer: http://" .. wrk.host .. "/" .. word .. "/" .. math.random(1e6) .. "\r\n"
        .. "Accept-Encoding: gzip, deflate, br, zstd\r\n"
        .. "Accept-Language: " .. languages[math.random(#languages)] .. "\r\n"
        .. "Cookie: session=" .. string.format("%08x%08x", math.random(2^31), math.random(2^31)) .. "; visit=",
      "; theme=dark\r\n\r\n",
    }
  end
  return function()
    counter = counter + 1
    local parts = pool[counter % 256 + 1]
    return parts[1] .. counter .. parts[2] .. counter .. parts[3]
  end
end

-- A path parameter that differs each time.
local function route_requests()
  local tail = " HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port .. "\r\nAccept: application/json\r\n\r\n"
  return function()
    counter = counter + 1
    return "GET /users/user-" .. counter .. "?v=1" .. tail
  end
end

-- Files of one directory in turn; with a validator, as a browser that has the file.
local function file_requests(name, count, validator)
  local tail = " HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port .. "\r\nAccept: */*\r\n"
  if validator and validator ~= "" then
    tail = tail .. "If-None-Match: " .. validator .. "\r\n"
  end
  local pool = {}
  for i = 0, count - 1 do
    pool[i] = "GET /files/" .. name .. "-" .. i .. ".bin" .. tail .. "\r\n"
  end
  return function()
    counter = counter + 1
    return pool[counter % count]
  end
end

function init(args)
  local kind, seed = args[1], tonumber(args[2]) or 1
  if kind == "browser" then
    request = browser_requests(seed)
  elseif kind == "route" then
    request = route_requests()
  elseif kind == "files" then
    request = file_requests(args[3], tonumber(args[4]), args[5])
  elseif kind == "post" then
    wrk.method = "POST"
    wrk.body = string.rep("0123456789abcdef", 64)
    wrk.headers["Content-Type"] = "application/octet-stream"
  end
end

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    'bench-result {"requests": %d, "seconds": %.6f, "bytes": %d, "p50_us": %.1f, "p99_us": %.1f, "max_us": %.1f, '
      .. '"connect_errors": %d, "read_errors": %d, "write_errors": %d, "timeouts": %d, "bad_statuses": %d}\n',
    summary.requests, summary.duration / 1e6, summary.bytes, latency:percentile(50), latency:percentile(99),
    latency.max, e.connect, e.read, e.write, e.timeout, e.status))
end
