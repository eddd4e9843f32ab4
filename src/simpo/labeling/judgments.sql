-- Judgments of labelers: every action is a row that is never changed.

create table if not exists events (
    number integer primary key autoincrement,
    key text not null unique,   -- made by the page, so that a request that is repeated counts once
    time text not null,         -- UTC
    labeler text not null,
    item text not null,
    kind text not null,         -- ranked, tie, both_bad, skip, undo
    ranks text,                 -- JSON: the rank of every answer in the order of the file, 1 for the best
    shown text,                 -- JSON: the answers' places in the file, in the order in which they were shown
    note text,
    seconds real                -- for which the item was visible
);
create table if not exists screens (
    labeler text primary key,
    item text not null,         -- what the labeler's page shows
    since real not null         -- Unix time
);
