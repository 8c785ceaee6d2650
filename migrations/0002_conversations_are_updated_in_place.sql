-- Each message moves its conversation's clock. With an index on a column that moves along, every move wrote to all
-- indexes of the table; without, and with room on the page, PostgreSQL changes the row in place (HOT).
DROP INDEX conversation_last_activity_idx;
ALTER TABLE conversation SET (fillfactor = 70);
