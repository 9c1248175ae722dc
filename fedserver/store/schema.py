"""The tables.

Columns named *_at hold seconds since the epoch by the wall clock. Durations don't rest on it: *_s
columns hold seconds by the run's own clock (run_clock.py), NULL in rows of before revision 0008.
JSON columns hold plain values.
"""

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
)

FIRST_REVISION = "0006"
"""The schema that databases had before there were migrations; older databases can't be upgraded."""

REVISION = "0011"
"""The newest migration: what its tables are is below (see migrations/__init__.py)."""

metadata = MetaData()

# Which version a database has, for software from before there were migrations: it refuses any but
# its own. Today's reads alembic's table.
about = Table(
    "about",
    metadata,
    Column("schema_version", Integer, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("number", Integer, nullable=False, unique=True),
    Column("state", String, nullable=False),
    Column("settings", JSON, nullable=False),
    # The digest of the ledger's last entry: without it a missing end of the chain wouldn't show.
    Column("ledger_head", String),
    Column("started_at", Float, nullable=False),
    Column("finished_at", Float),
    # Which start of the machine the run's clock rests on, and its reading when the run began.
    Column("clock_boot", String),
    Column("clock_zero_s", Float),
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", String, primary_key=True),
    Column("run_id", ForeignKey("runs.run_id"), nullable=False),
    Column("instance_key", String, nullable=False),
    Column("client_ids", JSON, nullable=False),
    Column("num_examples", JSON, nullable=False),
    Column("software_version", String, nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("phase", String, nullable=False),
    Column("base_digest", String, nullable=False),
    # The server state that goes with the base, and with the model; NULL where there is none.
    Column("base_state_digest", String),
    Column("base_bytes", Integer, nullable=False),
    Column("max_delta_norm", Float, nullable=False),
    Column("model_digest", String),
    Column("state_digest", String),
    # How the settings were changed for this attempt, and how its end changed them for the next.
    Column("adjustments", JSON, nullable=False),
    Column("adjustments_after", JSON(none_as_null=True)),
    Column("evaluation", JSON(none_as_null=True)),
    # What is wrong with the model, as its evaluation shows.
    Column("alarm", String),
    # Orders of earlier rounds that were still at work when it opened; 0 but in asynchronous runs.
    Column("num_carried_over", Integer, nullable=False),
    # How good the base is on the round's own clients, as they say.
    Column("client_evaluation", JSON(none_as_null=True)),
    Column("started_at", Float, nullable=False),
    Column("closed_at", Float),
    Column("finished_at", Float),
    Column("opened_s", Float),
    Column("closed_s", Float),
    Column("finished_s", Float),
)

orders = Table(
    "orders",
    metadata,
    Column("order_id", String, primary_key=True),
    Column("run_id", String, nullable=False),
    Column("round", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("client_id", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("handed_out_at", Float),
    Column("ended_at", Float),
    # How many examples the client had registered when it got the order; NULL where an older version
    # gave it.
    Column("num_examples", Integer),
    # The cause of an end without an update that counts (OrderEnd). NULL: the order goes on, or its
    # update decided.
    Column("order_end", String),
    ForeignKeyConstraint(
        ["run_id", "round", "attempt"], ["rounds.run_id", "rounds.round", "rounds.attempt"]
    ),
    Index("orders_by_round", "run_id", "round", "attempt"),
    Index("orders_by_state", "run_id", "state"),
)

updates = Table(
    "updates",
    metadata,
    Column("order_id", ForeignKey("orders.order_id"), primary_key=True),
    # The attempt at a round that it came into: its order's, or in an asynchronous run the attempt
    # that collected when it came.
    Column("round", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("digest", String, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("sections", JSON, nullable=False),
    Column("encoding", String, nullable=False),
    Column("num_examples", Integer, nullable=False),
    Column("num_steps", Integer, nullable=False),
    Column("metrics", JSON, nullable=False),
    # L2 norm of local minus global over all parameters; of those that were examined to the end.
    Column("delta_norm", Float),
    Column("received_at", Float, nullable=False),
    Column("reason", String),
    Column("received_s", Float),
    # From the hand-over of the order to its update, in seconds.
    Column("answered_s", Float),
    # What the client reports of the task's own metrics, until its round is done. NULL: nothing.
    Column("measurements", JSON(none_as_null=True)),
    Index("updates_by_round", "round", "attempt"),
)

standings = Table(
    "standings",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), primary_key=True),
    Column("client_id", Integer, primary_key=True),
    Column("strikes", Integer, nullable=False),
    # The first round the client takes part in again.
    Column("suspended_until", Integer, nullable=False),
    Column("reason", String, nullable=False),
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("order_id", ForeignKey("updates.order_id"), primary_key=True),
    Column("run_id", ForeignKey("runs.run_id"), nullable=False),
    Column("state", String, nullable=False),
    Column("evidence", JSON, nullable=False),
    # What is kept of the payload; 0 where it was refused before any byte was taken.
    Column("kept_bytes", Integer, nullable=False),
    Column("held_at", Float, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("run_id", ForeignKey("runs.run_id"), nullable=False),
    Column("kind", String, nullable=False),
    Column("at", Float, nullable=False),
    Column("round", Integer),
    Column("attempt", Integer),
    Column("client_id", Integer),
    Column("is_incident", Boolean, nullable=False),
    Column("fields", JSON, nullable=False),
    # Tells an incident reported twice from two incidents; empty for what the server saw itself.
    Column("report_key", String, unique=True),
    Index("events_by_round", "run_id", "round"),
)

ledger = Table(
    "ledger",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    # A round that was done and then rolled back has an entry of each.
    Column("kind", String, primary_key=True),
    Column("entry", String, nullable=False),
    Column("digest", String, nullable=False),
)
