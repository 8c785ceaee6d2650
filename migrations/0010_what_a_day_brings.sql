-- The conversations and the reports of a user within a day are counted by an index: 0016 builds it, beside the writers.
SELECT;
