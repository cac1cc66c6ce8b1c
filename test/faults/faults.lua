-- Faults between agentvm and EC2, and the idempotency that moto lacks. Commands, any HTTP method, parameters also as a form:
--
--   /_faults/set?mode=M&action=A&n=N&market=spot|on-demand&skip=S&...
--        the next N calls (default: all to come) of action A (default: any) fail as M says, the first S of them excepted;
--        the first rule that fits decides; a rule with market fits RunInstances of that market only, one with match (&match=V)
--        calls that have a parameter of that value, such as a team's tag; one with chance (&chance=5) that many of a hundred
--        the action of a service that speaks JSON is the last part of its X-Amz-Target: PutParameter
--   /_faults/clear      no more rules            /_faults/reset      nor counts, tokens and canned instances
--   /_faults/seed?seed=N      what is left to chance, from here on
--   /_faults/counts     {"received": {"RunInstances": 3, ...}, "cloud": {...}, "faulted": {...}, "replayed": {...}, "mismatched": {...},
--                       "launched": {...}: tokens that have launched}
--
-- Modes: pass; capacity; throttle; 500 (EC2's own, as XML); html (a 502 that is no XML); auth (credentials refused);
-- error (&status=400&code=X&message=Y); slow (&ms=N, then on); drop (closed before the cloud saw it); lost (the cloud did it,
-- the caller sees the connection close); truncated (half of the cloud's answer); body (&status=200&body=...&repeat=N&location=URL);
-- raw (&head=...&piece=...&repeat=N&tail=...&ms=N: these very bytes instead of HTTP, the piece N times (or "endless"), N ms before
-- each and its number for every %n% in it, then close);
-- canned (&ms=N: answered here without a cloud; with &copies=N lists tell of N more like each instance: the copy's number,
-- in hexadecimal, stands for the first eight digits of its id and of its session's). With &log=0 the
-- calls are not written to requests.log, which benches would make large.
local M = {}
local rules, counts, tokens, canned = ngx.shared.rules, ngx.shared.counts, ngx.shared.tokens, ngx.shared.canned

local errors = {
    capacity = { status = 500, code = "InsufficientInstanceCapacity", message = "There is no capacity of this type in the zone." },
    throttle = { status = 503, code = "RequestLimitExceeded", message = "Request limit exceeded." },
    ["500"] = { status = 500, code = "InternalError", message = "An internal error has occurred" },
    auth = { status = 401, code = "AuthFailure", message = "AWS was not able to validate the provided access credentials" },
}

local function count(kind, action)
    counts:incr(kind .. ":" .. action, 1, 0)
end

local function reply(status, body, content_type)
    ngx.status = status
    ngx.header.content_type = content_type or "text/xml;charset=UTF-8"
    ngx.header.content_length = #body
    ngx.print(body)
end

local function fail(fault)
    reply(tonumber(fault.status) or 400, string.format('<?xml version="1.0" encoding="UTF-8"?>\n<Response><Errors><Error><Code>%s</Code>'
        .. "<Message>%s</Message></Error></Errors><RequestID>%s</RequestID></Response>", fault.code or "Unknown", fault.message or "",
        ngx.var.request_id))
end

local function refused(code, message)
    return 400, string.format('<?xml version="1.0" encoding="UTF-8"?>\n<Response><Errors><Error><Code>%s</Code><Message>%s</Message></Error></Errors>'
        .. "</Response>", code, message)
end

local function has_value(args, wanted)
    for _, value in pairs(args) do
        if value == wanted then
            return true
        end
    end
    return false
end

-- The rule that decides about this call, which uses up one of its n
local function rule_for(action, args)
    local market = args["InstanceMarketOptions.MarketType"] or "on-demand"
    for i = 1, rules:get("last") or 0 do
        local rule = ngx.decode_args(rules:get("rule:" .. i), 0)
        local fits = (not rule.action or rule.action == "*" or rule.action == action)
            and (not rule.market or (action == "RunInstances" and rule.market == market))
            and (not rule.match or has_value(args, rule.match))
            and (not rule.chance or math.random() * 100 < tonumber(rule.chance))
        if fits and rules:incr("skip:" .. i, -1) < 0 and (not rule.n or rules:incr("n:" .. i, -1) >= 0) then
            return rule
        end
    end
    return { mode = "pass" }
end

local function subnet_of(args)
    return args.SubnetId or args["NetworkInterface.1.SubnetId"] or ""
end

-- All parameters in one string, whatever their order was
local function fingerprint(args)
    local keys = {}
    for key, value in pairs(args) do
        keys[#keys + 1] = key .. "=" .. tostring(value)
    end
    table.sort(keys)
    return ngx.md5(table.concat(keys, "&"))
end

local function ask_cloud(action)
    count("cloud", action)
    local answer = ngx.location.capture("/_cloud", { method = ngx.HTTP_POST, always_forward_body = true })
    return answer.status, answer.body, answer.header["Content-Type"]
end

-- RunInstances with a token: scoped to the subnet, as EC2's is to the zone. The first caller asks the cloud, those who
-- come meanwhile wait for its answer; a failed launch leaves the token free; one whose instance was ended through us launches
-- no more.
local function run_once(action, args, before)
    local token = args.ClientToken and args.ClientToken .. "|" .. subnet_of(args)
    if not token then
        if before() then
            return ask_cloud(action)
        end
        return nil
    end
    local wanted = fingerprint(args)
    while not tokens:add(token .. "|wanted", wanted) do
        if tokens:get(token .. "|wanted") ~= wanted then
            count("mismatched", action)
            return refused("IdempotentParameterMismatch", "The client token was used with other parameters")
        end
        local body = tokens:get(token .. "|body")
        if body and tokens:get(body:match("<instanceId>(.-)<") .. "|ended") then
            return refused("IdempotentInstanceTerminated", "The instance of the client token has been terminated")
        elseif body then
            count("replayed", action)
            return 200, body
        end
        ngx.sleep(0.01)
    end
    if not before() then
        tokens:delete(token .. "|wanted")
        return nil
    end
    local status, body, content_type = ask_cloud(action)
    if status == 200 then
        tokens:set(token .. "|body", body)
        count("launched", action)
    else
        tokens:delete(token .. "|wanted")
    end
    return status, body, content_type
end

-- Answers without a cloud: what was launched is remembered, by id, token and session tag
local function instance_xml(id)
    local subnet, market, state = canned:get(id .. "|subnet"), canned:get(id .. "|market"), canned:get(id .. "|state")
    local codes = { running = 16, ["shutting-down"] = 32, terminated = 48 }
    return string.format("<item><instanceId>%s</instanceId><imageId>ami-12345678</imageId><instanceState><code>%d</code><name>%s</name>"
        .. "</instanceState><privateIpAddress>10.0.0.1</privateIpAddress><instanceType>t3.micro</instanceType><subnetId>%s</subnetId>"
        .. "<placement><availabilityZone>us-east-1a</availabilityZone></placement>%s<clientToken>%s</clientToken><tagSet>"
        .. "<item><key>agentvm-session-id</key><value>%s</value></item></tagSet></item>", id, codes[state], state, subnet,
        market == "spot" and "<instanceLifecycle>spot</instanceLifecycle>" or "", canned:get(id .. "|token"), canned:get(id .. "|session"))
end

local function envelope(action, inside)
    return string.format('<?xml version="1.0" encoding="UTF-8"?>\n<%sResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>%s'
        .. "</requestId>%s</%sResponse>", action, ngx.var.request_id, inside, action)
end

local function access_key()
    return (ngx.var.http_authorization or ""):match("Credential=([^/]+)/") or ""
end

local function escape(text)
    return (text:gsub("[&<>]", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;" }))
end

-- As long as what EC2 tells of an instance
local function listed_xml(id)
    local market, state = canned:get(id .. "|market"), canned:get(id .. "|state")
    local codes = { running = 16, ["shutting-down"] = 32, terminated = 48 }
    local group = "<groupSet><item><groupId>sg-12345678</groupId><groupName>default</groupName></item></groupSet>"
    return string.format("<item><reservationId>r-%s</reservationId><ownerId>123456789012</ownerId><groupSet/><instancesSet><item>"
        .. "<instanceId>%s</instanceId><imageId>ami-12345678</imageId><instanceState><code>%d</code><name>%s</name></instanceState>"
        .. "<privateDnsName>ip-10-0-0-1.ec2.internal</privateDnsName><dnsName/><reason/><amiLaunchIndex>0</amiLaunchIndex><productCodes/>"
        .. "<instanceType>t3.micro</instanceType><launchTime>%s</launchTime><placement><availabilityZone>us-east-1a</availabilityZone>"
        .. "<groupName/><tenancy>default</tenancy></placement><monitoring><state>disabled</state></monitoring><subnetId>%s</subnetId>"
        .. "<vpcId>vpc-12345678</vpcId><privateIpAddress>10.0.0.1</privateIpAddress><sourceDestCheck>true</sourceDestCheck>%s"
        .. "<architecture>x86_64</architecture><rootDeviceType>ebs</rootDeviceType><rootDeviceName>/dev/sda1</rootDeviceName>"
        .. "<blockDeviceMapping><item><deviceName>/dev/sda1</deviceName><ebs><volumeId>vol-0123456789abcdef0</volumeId>"
        .. "<status>attached</status><attachTime>%s</attachTime><deleteOnTermination>true</deleteOnTermination></ebs></item>"
        .. "</blockDeviceMapping>%s<virtualizationType>hvm</virtualizationType><clientToken>%s</clientToken><tagSet>%s</tagSet>"
        .. "<hypervisor>xen</hypervisor><networkInterfaceSet><item><networkInterfaceId>eni-0123456789abcdef0</networkInterfaceId>"
        .. "<subnetId>%s</subnetId><vpcId>vpc-12345678</vpcId><description/><ownerId>123456789012</ownerId><status>in-use</status>"
        .. "<macAddress>02:00:00:00:00:01</macAddress><privateIpAddress>10.0.0.1</privateIpAddress>"
        .. "<privateDnsName>ip-10-0-0-1.ec2.internal</privateDnsName><sourceDestCheck>true</sourceDestCheck>%s<attachment>"
        .. "<attachmentId>eni-attach-0123456789abcdef0</attachmentId><deviceIndex>0</deviceIndex><status>attached</status>"
        .. "<attachTime>%s</attachTime><deleteOnTermination>true</deleteOnTermination><networkCardIndex>0</networkCardIndex></attachment>"
        .. "<privateIpAddressesSet><item><privateIpAddress>10.0.0.1</privateIpAddress>"
        .. "<privateDnsName>ip-10-0-0-1.ec2.internal</privateDnsName><primary>true</primary></item></privateIpAddressesSet>"
        .. "<ipv6AddressesSet/><interfaceType>interface</interfaceType></item></networkInterfaceSet><ebsOptimized>false</ebsOptimized>"
        .. "<enaSupport>true</enaSupport><cpuOptions><coreCount>1</coreCount><threadsPerCore>2</threadsPerCore></cpuOptions>"
        .. "<capacityReservationSpecification><capacityReservationPreference>open</capacityReservationPreference>"
        .. "</capacityReservationSpecification><hibernationOptions><configured>false</configured></hibernationOptions><metadataOptions>"
        .. "<state>applied</state><httpTokens>required</httpTokens><httpPutResponseHopLimit>1</httpPutResponseHopLimit>"
        .. "<httpEndpoint>enabled</httpEndpoint><httpProtocolIpv6>disabled</httpProtocolIpv6>"
        .. "<instanceMetadataTags>disabled</instanceMetadataTags></metadataOptions><enclaveOptions><enabled>false</enabled></enclaveOptions>"
        .. "<platformDetails>Linux/UNIX</platformDetails><usageOperation>RunInstances</usageOperation><privateDnsNameOptions>"
        .. "<hostnameType>ip-name</hostnameType><enableResourceNameDnsARecord>false</enableResourceNameDnsARecord>"
        .. "</privateDnsNameOptions><maintenanceOptions><autoRecovery>default</autoRecovery></maintenanceOptions>"
        .. "<currentInstanceBootMode>legacy-bios</currentInstanceBootMode></item></instancesSet></item>",
        id:sub(3), id, codes[state], state, canned:get(id .. "|at"), canned:get(id .. "|subnet"), group, canned:get(id .. "|at"),
        market == "spot" and "<instanceLifecycle>spot</instanceLifecycle>" or "", canned:get(id .. "|token"), canned:get(id .. "|tags"),
        canned:get(id .. "|subnet"), group, canned:get(id .. "|at"))
end

-- A page of what was launched with the caller's key and this cluster's tag
local function list(action, args, cluster, copies)
    local key, items, n = access_key(), {}, 0
    local first = tonumber(args.NextToken) or 0
    local last = first + (tonumber(args.MaxResults) or 1000)
    for i = 1, canned:get("of:" .. key) or 0 do
        local id = canned:get("of:" .. key .. ":" .. i)
        if canned:get(id .. "|cluster") == cluster then
            local item
            for copy = math.max(first - n, 0), math.min(copies, last - n - 1) do
                item = item or listed_xml(id)
                if copy == 0 then
                    items[#items + 1] = item
                else
                    local session, number = canned:get(id .. "|session"), string.format("%08x", copy)
                    local other = item:gsub(id:sub(3), number .. id:sub(11))
                    items[#items + 1] = other:gsub(session:gsub("-", "%%-"), number .. session:sub(9))
                end
            end
            n = n + copies + 1
        end
    end
    return reply(200, envelope(action, "<reservationSet>" .. table.concat(items) .. "</reservationSet>"
        .. (n > last and "<nextToken>" .. last .. "</nextToken>" or "")))
end

local function from_the_can(action, args, rule)
    local ids, items = {}, {}
    if rule.ms then
        ngx.sleep(tonumber(rule.ms) / 1000)
    end
    for i = 1, 1000 do
        local id = args["InstanceId." .. i]
        if not id then break end
        ids[i] = id
    end
    if action == "RunInstances" then
        local key = "token:" .. (args.ClientToken or ngx.var.request_id) .. "|" .. subnet_of(args)
        local id = string.format("i-%017x", canned:incr("last", 1, 0))
        if not canned:add(key, id) then
            id = canned:get(key)
            count("replayed", action)
        else
            local tags, of = {}, {}
            for i = 1, 50 do
                local name, value = args["TagSpecification.1.Tag." .. i .. ".Key"], args["TagSpecification.1.Tag." .. i .. ".Value"]
                if not name then break end
                of[name] = value
                tags[i] = "<item><key>" .. escape(name) .. "</key><value>" .. escape(value) .. "</value></item>"
            end
            local session = of["agentvm-session-id"] or ""
            canned:set(id .. "|state", "running")
            canned:set(id .. "|subnet", subnet_of(args))
            canned:set(id .. "|market", args["InstanceMarketOptions.MarketType"] or "on-demand")
            canned:set(id .. "|token", args.ClientToken or "")
            canned:set(id .. "|session", session)
            canned:set(id .. "|cluster", of["agentvm-cluster"])
            canned:set(id .. "|tags", table.concat(tags))
            canned:set(id .. "|at", os.date("!%Y-%m-%dT%H:%M:%S.000Z"))
            canned:set("session:" .. session, id)
            canned:set("of:" .. access_key() .. ":" .. canned:incr("of:" .. access_key(), 1, 0), id)
        end
        return reply(200, envelope(action, "<reservationId>r-1</reservationId><instancesSet>" .. instance_xml(id) .. "</instancesSet>"))
    elseif action == "TerminateInstances" then
        for i, id in ipairs(ids) do
            if canned:get(id .. "|state") then
                canned:set(id .. "|state", "terminated")
            end
            items[i] = "<item><instanceId>" .. id .. "</instanceId><currentState><code>32</code><name>shutting-down</name></currentState>"
                .. "<previousState><code>16</code><name>running</name></previousState></item>"
        end
        return reply(200, envelope(action, "<instancesSet>" .. table.concat(items) .. "</instancesSet>"))
    elseif action == "DescribeInstances" then
        for i = 1, 10 do
            local name = args["Filter." .. i .. ".Name"]
            for v = 1, 200 do
                local value = args["Filter." .. i .. ".Value." .. v]
                if not value then break end
                if name == "tag:agentvm-cluster" then
                    return list(action, args, value, tonumber(rule.copies) or 0)
                elseif name == "tag:agentvm-session-id" then
                    ids[#ids + 1] = canned:get("session:" .. value)
                elseif name == "client-token" then
                    ids[#ids + 1] = canned:get("token:" .. value .. "|")
                end
            end
        end
        for _, id in ipairs(ids) do
            if canned:get(id .. "|state") then
                items[#items + 1] = "<item><reservationId>r-1</reservationId><instancesSet>" .. instance_xml(id) .. "</instancesSet></item>"
            end
        end
        return reply(200, envelope(action, "<reservationSet>" .. table.concat(items) .. "</reservationSet>"))
    end
    return fail({ status = 400, code = "InvalidAction", message = "not in the can" })
end

-- Bytes that need not be HTTP, until they are all sent or nobody listens any more
local function raw(rule)
    local socket = ngx.req.socket(true)
    local piece, last = rule.piece or "", rule["repeat"] == "endless" and math.huge or tonumber(rule["repeat"]) or 1
    local numbered = piece:find("%n%", 1, true)
    local sent, at_once = 0, rule.ms and 1 or 1000
    local good = socket:send(rule.head or "")
    while good and sent < last do
        local count, block = math.min(at_once, last - sent), {}
        for i = 1, numbered and count or 0 do
            block[i] = piece:gsub("%%n%%", sent + i)
        end
        if rule.ms then
            ngx.sleep(tonumber(rule.ms) / 1000)
        end
        good = socket:send(numbered and block or piece:rep(count))
        sent = sent + count
    end
    if good then
        socket:send(rule.tail or "")
    end
    return ngx.exit(444)
end

function M.serve()
    ngx.req.read_body()
    local target = ngx.var.http_x_amz_target
    local args = target and {} or ngx.req.get_post_args(0)
    local action = args.Action or target and target:match("%.(%w+)$") or "?"
    ngx.var.action = action
    count("received", action)

    local rule = rule_for(action, args)
    local mode = rule.mode
    ngx.var.outcome = mode
    ngx.var.log = rule.log or 1
    if mode ~= "pass" and mode ~= "canned" then
        count("faulted", action)
    end
    if mode == "canned" or (mode == "pass" and ngx.var.no_cloud == "") then
        return from_the_can(action, args, rule)
    elseif mode == "drop" then
        return ngx.exit(444)
    elseif mode == "html" then
        return reply(502, "<html><head><title>502 Bad Gateway</title></head><body><center><h1>502</h1></body></html>", "text/html")
    elseif mode == "body" then
        ngx.header.location = rule.location
        return reply(tonumber(rule.status) or 200, string.rep(rule.body or "", tonumber(rule["repeat"]) or 1))
    elseif mode == "raw" then
        return raw(rule)
    elseif mode == "error" then
        return fail(rule)
    elseif errors[mode] and mode ~= "capacity" then
        return fail(errors[mode])
    elseif mode == "slow" then
        ngx.sleep((tonumber(rule.ms) or 1000) / 1000)
    end

    -- a token that has launched already is answered from the table even when there is no capacity left
    local status, body, content_type
    local function before()
        return mode ~= "capacity"
    end
    if action == "RunInstances" then
        status, body, content_type = run_once(action, args, before)
    elseif before() then
        status, body, content_type = ask_cloud(action)
        if action == "TerminateInstances" and status == 200 then
            for id in body:gmatch("<instanceId>(.-)<") do
                tokens:set(id .. "|ended", true)
            end
        end
    end
    if not status then
        return fail(errors.capacity)
    elseif mode == "lost" then
        return ngx.exit(444)
    elseif mode == "truncated" then
        body = body:sub(1, math.floor(#body / 2))
    end
    return reply(status, body, content_type)
end

function M.control()
    ngx.req.read_body()
    local command, args = ngx.var.uri:match("^/_faults/(.*)$"), ngx.req.get_uri_args(0)
    for key, value in pairs(ngx.req.get_post_args(0)) do
        args[key] = value
    end
    if command == "set" then
        if not args.mode then
            return reply(400, "mode is missing\n", "text/plain")
        end
        local i = rules:incr("last", 1, 0)
        rules:set("rule:" .. i, ngx.encode_args(args))
        rules:set("n:" .. i, tonumber(args.n) or 0)
        rules:set("skip:" .. i, tonumber(args.skip) or 0)
    elseif command == "seed" then
        math.randomseed(tonumber(args.seed) or 0)
    elseif command == "clear" or command == "reset" then
        rules:flush_all()
        if command == "reset" then
            counts:flush_all()
            tokens:flush_all()
            canned:flush_all()
        end
    elseif command == "counts" then
        local kinds, parts = {}, {}
        for _, kind in ipairs({ "received", "cloud", "faulted", "replayed", "mismatched", "launched" }) do
            kinds[kind] = {}
        end
        for _, key in ipairs(counts:get_keys(0)) do
            local kind, action = key:match("^(%w+):(.*)$")
            table.insert(kinds[kind], string.format('"%s":%d', action:gsub("[^%w?]", "_"), counts:get(key)))
        end
        for kind, list in pairs(kinds) do
            parts[#parts + 1] = string.format('"%s":{%s}', kind, table.concat(list, ","))
        end
        return reply(200, "{" .. table.concat(parts, ",") .. "}\n", "application/json")
    else
        return reply(404, "no such command\n", "text/plain")
    end
    return reply(200, "ok\n", "text/plain")
end

return M
