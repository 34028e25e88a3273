-- router.db: everything but the locks themselves. Times are Unix seconds; ids of users as in model.UserId.

CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;

-- Deliveries that wait or are in flight. Of each user queue (user, tenant) exactly one row has a due
-- time: the head. The others wait for it.
CREATE TABLE delivery (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- in order of arrival, never used twice
    tenant INTEGER NOT NULL,
    user TEXT NOT NULL,
    alias TEXT,
    event_time REAL NOT NULL,
    arrived REAL NOT NULL,
    idempotency_key TEXT NOT NULL,
    message_id TEXT,
    headers TEXT NOT NULL,                 -- JSON: [[name, value], …]
    due REAL,
    attempts INTEGER NOT NULL DEFAULT 0,   -- failed so far
    poison_attempts INTEGER NOT NULL DEFAULT 0,
    tried_at REAL,                         -- when the last attempt ended
    age REAL NOT NULL DEFAULT 0,           -- seconds that count towards MAX_DELIVERY_AGE
    last_error TEXT,
    body BLOB NOT NULL                     -- last: long ones do not slow down the columns before
);
CREATE INDEX delivery_queue ON delivery (user, tenant, event_time, id);
CREATE INDEX delivery_head ON delivery (tenant, due, id) WHERE due IS NOT NULL;

-- Messages of users without a lock, kept a while for a link that is still on its way.
CREATE TABLE held (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user TEXT NOT NULL,
    sent_second INTEGER NOT NULL,          -- model.Moment
    sent_fraction REAL NOT NULL,
    event_time REAL NOT NULL,
    arrived REAL NOT NULL,
    idempotency_key TEXT NOT NULL,
    message_id TEXT,
    headers TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX held_user ON held (user);
CREATE INDEX held_key ON held (idempotency_key);
CREATE INDEX held_arrived ON held (arrived);

-- Deliveries given up on.
CREATE TABLE dead_letter (
    id INTEGER PRIMARY KEY,                -- the delivery's
    tenant INTEGER NOT NULL,
    user TEXT NOT NULL,
    alias TEXT,
    event_time REAL NOT NULL,
    arrived REAL NOT NULL,
    idempotency_key TEXT NOT NULL,
    message_id TEXT,
    headers TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    died_at REAL NOT NULL,
    reason TEXT NOT NULL,
    status INTEGER,                        -- of the backend's last answer
    answer BLOB NOT NULL,                  -- its first bytes
    body BLOB NOT NULL
);

CREATE INDEX dead_letter_user ON dead_letter (user);
CREATE INDEX dead_letter_tenant ON dead_letter (tenant);

-- Messages delivered to each tenant, and when the first and the last one was accepted. Written
-- every few seconds.
CREATE TABLE tenant (
    id INTEGER PRIMARY KEY,
    delivered INTEGER NOT NULL,
    first_seen REAL,
    last_seen REAL
);

-- Lock changes that are not yet in router_mappings.json. tenant NULL: unlocked.
CREATE TABLE lock_redo (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user TEXT NOT NULL,
    tenant INTEGER
);

-- Evidence: every change of a lock, and every link that changed none. Entries are only added; an
-- erasure takes the names off them.
CREATE TABLE history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,                      -- our clock
    user TEXT NOT NULL,
    kind TEXT NOT NULL,                    -- lock_events.Kind or model.Note
    from_tenant INTEGER,
    to_tenant INTEGER,
    changed_second INTEGER,                -- model.Moment of the change; NULL: the lock did not change
    changed_fraction REAL,
    message_id TEXT,
    why TEXT,                              -- lock_events.Why; NULL: the person was erased
    who TEXT,                              -- the operator's name, or waha
    other TEXT                             -- the other id of a merge
);
CREATE INDEX history_change ON history (user, id) WHERE changed_second IS NOT NULL;
CREATE INDEX history_user ON history (user, id);
CREATE INDEX history_other ON history (other) WHERE other IS NOT NULL;

-- Which LID is which phone: one to one. phone = lid: it lost its phone to another LID.
CREATE TABLE alias (
    lid TEXT PRIMARY KEY,
    phone TEXT NOT NULL UNIQUE,
    linked_at REAL NOT NULL                -- when a message showed both, or WAHA was asked
) WITHOUT ROWID;

-- What else is known of a person.
CREATE TABLE person (
    user TEXT PRIMARY KEY,
    record TEXT NOT NULL,                  -- JSON, see store/person_record.py
    help_waits_since REAL,                 -- NULL: no help message waits to be sent
    updated_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX person_help ON person (help_waits_since) WHERE help_waits_since IS NOT NULL;
CREATE INDEX person_updated ON person (updated_at);

-- Up to when messages of each WAHA session were accepted: from there on WAHA is asked for more.
CREATE TABLE heard (session TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;

-- Messages that were answered 200 and went to nobody, for a person to see.
CREATE TABLE unreadable (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key BLOB UNIQUE,                       -- of the event, as in dedup_0
    arrived REAL NOT NULL,
    session TEXT NOT NULL,
    event TEXT NOT NULL,
    reason TEXT NOT NULL,                  -- model.UnreadableReason
    user TEXT,
    message_id TEXT,
    body BLOB NOT NULL
);
CREATE INDEX unreadable_user ON unreadable (user) WHERE user IS NOT NULL;

-- Keys of events accepted. Three tables that take turns, see dedup.DedupKeys. phone and lid are
-- hashes of the person's ids, 0 if unknown then: no number is stored. routed: it went to a tenant.
CREATE TABLE dedup_0 (key BLOB, phone INTEGER, lid INTEGER, routed INTEGER, PRIMARY KEY (key, phone, lid)) WITHOUT ROWID;
CREATE TABLE dedup_1 (key BLOB, phone INTEGER, lid INTEGER, routed INTEGER, PRIMARY KEY (key, phone, lid)) WITHOUT ROWID;
CREATE TABLE dedup_2 (key BLOB, phone INTEGER, lid INTEGER, routed INTEGER, PRIMARY KEY (key, phone, lid)) WITHOUT ROWID;
