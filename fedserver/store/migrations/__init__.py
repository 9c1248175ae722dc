"""The schema's history as alembic revisions, one file for each in versions/.

To change the schema:

1. Change the table in fedserver/store/schema.py and raise REVISION there by one.
2. Add versions/vNNNN_what_changes.py: `revision` is the new number as four digits, `down_revision`
   the number before it, `upgrade()` makes the change. Copy the newest file there.
3. Run tests/unit/server/test_upgrades.py: it compares the tables that the revisions make with
   schema.py.

Write `op.batch_alter_table` for anything but a new table, column or index: SQLite can't alter a
column in place. A new column that must not be NULL needs a `server_default`, or an UPDATE in
`upgrade()` that says what it is for rows that are there. A revision never imports schema.py, which
changes after it. A revision that has been released is never edited. There is no `downgrade()`: the
way back is the copy that every upgrade writes first.
"""
