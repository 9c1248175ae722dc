"""Durations by a clock that nobody can set, beside the times of the wall clock."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the clock's columns; they stay NULL in what is there."""
    op.add_column("runs", sa.Column("clock_boot", sa.String(), nullable=True))
    op.add_column("runs", sa.Column("clock_zero_s", sa.Float(), nullable=True))
    for name in ("opened_s", "closed_s", "finished_s"):
        op.add_column("rounds", sa.Column(name, sa.Float(), nullable=True))
    for name in ("received_s", "answered_s"):
        op.add_column("updates", sa.Column(name, sa.Float(), nullable=True))
