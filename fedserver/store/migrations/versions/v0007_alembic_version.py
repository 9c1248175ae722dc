"""Alembic's table says the version; `about` is for the software before it, which refuses 7."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Let software that knows no migrations refuse the database."""
    op.execute("UPDATE about SET schema_version = 7")
