-- router.db as format 1 has it: what a start of that time made of whatever there was. See formats.py.

CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;

-- Deliveries that wait or are in flight. Of each line (user, tenant) exactly one row has a due time:
-- the head. The others wait for it.
CREATE TABLE IF NOT EXISTS delivery (
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
    own_faults INTEGER NOT NULL DEFAULT 0,
    tried_at REAL,                         -- when the last attempt ended
    age REAL NOT NULL DEFAULT 0,           -- seconds that count towards MAX_DELIVERY_AGE
    last_error TEXT,
    body BLOB NOT NULL                     -- last: long ones do not slow down the columns before
);
CREATE INDEX IF NOT EXISTS delivery_line ON delivery (user, tenant, event_time, id);
CREATE INDEX IF NOT EXISTS delivery_head ON delivery (tenant, due, id) WHERE due IS NOT NULL;

-- Messages of users without a lock, kept a while for a link that is still on its way.
CREATE TABLE IF NOT EXISTS held (
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
CREATE INDEX IF NOT EXISTS held_user ON held (user);
CREATE INDEX IF NOT EXISTS held_key ON held (idempotency_key);
CREATE INDEX IF NOT EXISTS held_arrived ON held (arrived);

-- Deliveries given up on.
CREATE TABLE IF NOT EXISTS dead_letter (
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

CREATE INDEX IF NOT EXISTS dead_letter_user ON dead_letter (user);
CREATE INDEX IF NOT EXISTS dead_letter_tenant ON dead_letter (tenant);

-- Messages delivered to each tenant, and when the first and the last one was accepted. Written
-- every few seconds.
CREATE TABLE IF NOT EXISTS tenant (
    id INTEGER PRIMARY KEY,
    delivered INTEGER NOT NULL,
    first_seen REAL,
    last_seen REAL
);

-- Lock changes that are not yet in router_mappings.json. tenant NULL: unlocked.
CREATE TABLE IF NOT EXISTS lock_redo (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user TEXT NOT NULL,
    tenant INTEGER
);

-- Evidence: every change of a lock, and every link that changed none. Lines are only added; an
-- erasure takes the names off them.
CREATE TABLE IF NOT EXISTS history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,                      -- our clock
    user TEXT NOT NULL,
    kind TEXT NOT NULL,                    -- history.Kind or model.Note
    from_tenant INTEGER,
    to_tenant INTEGER,
    changed_second INTEGER,                -- model.Moment of the change; NULL: the lock did not change
    changed_fraction REAL,
    message_id TEXT,
    why TEXT
);
CREATE INDEX IF NOT EXISTS history_change ON history (user, id) WHERE changed_second IS NOT NULL;
CREATE INDEX IF NOT EXISTS history_user ON history (user, id);
CREATE INDEX IF NOT EXISTS history_why ON history (why) WHERE why IS NOT NULL;

-- Which LID is which phone: one to one. phone = lid: it lost its phone to another LID.
CREATE TABLE IF NOT EXISTS alias (
    lid TEXT PRIMARY KEY,
    phone TEXT NOT NULL UNIQUE,
    sighted REAL NOT NULL                  -- when a message showed both, or WAHA was asked
) WITHOUT ROWID;

-- Help messages to users without a lock: those that wait, and when the last one was sent.
CREATE TABLE IF NOT EXISTS help (
    user TEXT PRIMARY KEY,
    queued_at REAL NOT NULL,
    sent_at REAL                           -- NULL: it waits
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS help_sent ON help (sent_at);

-- Up to when messages of each WAHA session were accepted: from there on WAHA is asked for more.
CREATE TABLE IF NOT EXISTS heard (session TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;

-- Messages that were answered 200 and went to nobody, for a person to see.
CREATE TABLE IF NOT EXISTS unreadable (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key BLOB UNIQUE,                       -- of the event, as in seen_0
    arrived REAL NOT NULL,
    session TEXT NOT NULL,
    event TEXT NOT NULL,
    reason TEXT NOT NULL,                  -- model.UnreadableReason
    user TEXT,
    message_id TEXT,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS unreadable_user ON unreadable (user) WHERE user IS NOT NULL;

-- Keys of events accepted. Three tables that take turns, see seen.SeenKeys. phone and lid are
-- hashes of the person's ids, 0 if unknown then, so that no number stands here. routed: it went to
-- a tenant.
CREATE TABLE IF NOT EXISTS seen_0 (key BLOB, phone INTEGER, lid INTEGER, routed INTEGER, PRIMARY KEY (key, phone, lid)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen_1 (key BLOB, phone INTEGER, lid INTEGER, routed INTEGER, PRIMARY KEY (key, phone, lid)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen_2 (key BLOB, phone INTEGER, lid INTEGER, routed INTEGER, PRIMARY KEY (key, phone, lid)) WITHOUT ROWID;
