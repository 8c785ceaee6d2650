-- Blocks, mutes and switches are counted as what reaches somebody is.
ALTER TABLE approach DROP CONSTRAINT approach_kind_known;
ALTER TABLE approach ADD CONSTRAINT approach_kind_known CHECK (
    kind IN ('add', 'invite', 'friend', 'follow', 'block', 'mute', 'switch')
) NOT VALID;
