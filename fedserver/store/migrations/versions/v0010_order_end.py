"""Orders record the cause of their end (NULL: the order goes on, or an update of it decided)."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the column, and fill it for orders that have ended.

    Revisions before this one told the cause by the times: an attempt's end abandoned its orders at
    the moment of its own end.
    """
    op.add_column("orders", sa.Column("order_end", sa.String(), nullable=True))
    op.execute("UPDATE orders SET order_end = 'round-closed' WHERE state = 'LATE'")
    op.execute("UPDATE orders SET order_end = 'given-up' WHERE state = 'ABANDONED'")
    for phase, order_end in (("FAILED", "attempt-failed"), ("ABANDONED", "taken-back")):
        op.execute(
            f"""
            UPDATE orders SET order_end = '{order_end}'
            WHERE state = 'ABANDONED' AND EXISTS (
                SELECT 1 FROM rounds LEFT JOIN updates ON updates.order_id = orders.order_id
                WHERE rounds.run_id = orders.run_id
                    AND rounds.round = coalesce(updates.round, orders.round)
                    AND rounds.attempt = coalesce(updates.attempt, orders.attempt)
                    AND rounds.phase = '{phase}' AND rounds.finished_at = orders.ended_at
            )
            """
        )
