"""What alembic runs: the revisions, on the connection and in the transaction of the caller."""

from alembic import context

from fedserver.store import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    render_as_batch=True,
)
context.run_migrations()
