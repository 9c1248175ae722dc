"""Orders record how many examples their clients had registered (NULL: an older version gave it)."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the column."""
    op.add_column("orders", sa.Column("num_examples", sa.Integer(), nullable=True))
