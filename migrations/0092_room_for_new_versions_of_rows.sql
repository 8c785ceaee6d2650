-- Room for a new version of each user on its own page, and of some messages. Only new pages get it.
ALTER TABLE "user" SET (fillfactor = 50);
ALTER TABLE message SET (fillfactor = 95);
