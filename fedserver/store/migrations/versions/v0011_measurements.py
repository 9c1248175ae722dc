"""Updates hold what clients measured of the task's own metrics, until their round is done."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Add the column."""
    op.add_column("updates", sa.Column("measurements", sa.JSON(), nullable=True))
