"""THE table: every frame, what it does, who may ask for it, whose allowance it takes, whether it may wait."""

from protocol import client
from server.dispatch import Access, Rate, Route
from server.handlers import (
    conversations,
    invitations,
    messages,
    moderation,
    participants,
    reactions,
    receipts,
    relationships,
    sessions,
    users,
)
from server.pressure import Shed

ROUTES: dict[type[client.Frame], Route] = {
    # the connection
    client.Ping: Route(sessions.ping, Access.USER, Rate.EPHEMERAL),
    client.Resume: Route(sessions.resume, Access.USER, Rate.READ),
    # conversations
    client.CreateDirect: Route(conversations.create_direct, Access.USER, Rate.WRITE),
    client.CreateGroup: Route(conversations.create_group, Access.USER, Rate.WRITE),
    client.CreateChannel: Route(conversations.create_channel, Access.USER, Rate.WRITE),
    client.ListConversations: Route(conversations.list_conversations, Access.USER, Rate.READ),
    client.GetConversation: Route(conversations.get, Access.PARTICIPANT, Rate.READ),
    client.UpdateConversation: Route(conversations.update, Access.PARTICIPANT, Rate.WRITE),
    client.DeleteConversation: Route(conversations.delete, Access.PARTICIPANT, Rate.WRITE),
    client.FindConversations: Route(conversations.find, Access.USER, Rate.READ),
    client.SetPreferences: Route(conversations.set_preferences, Access.PARTICIPANT, Rate.WRITE),
    # participants
    client.Join: Route(participants.join, Access.USER, Rate.WRITE),
    client.Leave: Route(participants.leave, Access.PARTICIPANT, Rate.WRITE),
    client.AddParticipants: Route(participants.add, Access.PARTICIPANT, Rate.WRITE),
    client.Invite: Route(invitations.invite, Access.PARTICIPANT, Rate.WRITE),
    client.Decline: Route(invitations.decline, Access.USER, Rate.WRITE),
    client.ListInvitations: Route(invitations.list_invitations, Access.USER, Rate.READ),
    client.SetInviteCode: Route(invitations.set_invite_code, Access.PARTICIPANT, Rate.WRITE),
    client.RemoveParticipant: Route(participants.remove, Access.PARTICIPANT, Rate.WRITE),
    client.Unban: Route(participants.unban, Access.PARTICIPANT, Rate.WRITE),
    client.SetRole: Route(participants.set_role, Access.PARTICIPANT, Rate.WRITE),
    client.SetPermissions: Route(participants.set_permissions, Access.PARTICIPANT, Rate.WRITE),
    client.TransferOwnership: Route(participants.transfer_ownership, Access.PARTICIPANT, Rate.WRITE),
    client.ListParticipants: Route(participants.list_participants, Access.PARTICIPANT, Rate.READ),
    # messages
    client.Send: Route(messages.send, Access.PARTICIPANT, Rate.WRITE),
    client.Edit: Route(messages.edit, Access.PARTICIPANT, Rate.WRITE),
    client.Delete: Route(messages.delete, Access.PARTICIPANT, Rate.WRITE),
    client.React: Route(reactions.react, Access.PARTICIPANT, Rate.WRITE),
    client.Unreact: Route(reactions.react, Access.PARTICIPANT, Rate.WRITE),
    client.Read: Route(receipts.read, Access.PARTICIPANT, Rate.WRITE, Shed.RECEIPTS),
    client.History: Route(messages.history, Access.PARTICIPANT, Rate.READ),
    client.GetMessage: Route(messages.get, Access.PARTICIPANT, Rate.READ),
    client.ListEdits: Route(messages.list_edits, Access.PARTICIPANT, Rate.READ),
    # moderation
    client.Moderate: Route(moderation.moderate, Access.PARTICIPANT, Rate.WRITE),
    client.Unmoderate: Route(moderation.unmoderate, Access.PARTICIPANT, Rate.WRITE),
    client.ReportMessage: Route(moderation.report, Access.PARTICIPANT, Rate.WRITE),
    client.ListReports: Route(moderation.list_reports, Access.PARTICIPANT, Rate.READ),
    client.DismissReport: Route(moderation.dismiss_report, Access.PARTICIPANT, Rate.WRITE),
    client.ListAudit: Route(moderation.list_audit, Access.PARTICIPANT, Rate.READ),
    # people
    client.Typing: Route(users.typing, Access.PARTICIPANT, Rate.EPHEMERAL, Shed.TYPING),
    client.SetPresence: Route(users.set_presence, Access.USER, Rate.EPHEMERAL, Shed.PRESENCE),
    client.Watch: Route(users.watch, Access.USER, Rate.READ, Shed.PRESENCE),
    client.Unwatch: Route(users.unwatch, Access.USER, Rate.EPHEMERAL),
    client.GetUsers: Route(users.get, Access.USER, Rate.READ),
    client.GetProfile: Route(users.profile, Access.USER, Rate.READ),
    client.SearchUsers: Route(users.search_users, Access.USER, Rate.READ),
    client.GetMe: Route(users.me, Access.USER, Rate.READ),
    client.UpdateProfile: Route(users.update_profile, Access.USER, Rate.WRITE),
    # relationships
    client.RequestFriend: Route(relationships.request_friend, Access.USER, Rate.WRITE),
    client.AnswerFriend: Route(relationships.answer_friend, Access.USER, Rate.WRITE),
    client.Unfriend: Route(relationships.unfriend, Access.USER, Rate.WRITE),
    client.Block: Route(relationships.turned("block", on=True), Access.USER, Rate.WRITE),
    client.Unblock: Route(relationships.turned("block", on=False), Access.USER, Rate.WRITE),
    client.Follow: Route(relationships.turned("follow", on=True), Access.USER, Rate.WRITE),
    client.Unfollow: Route(relationships.turned("follow", on=False), Access.USER, Rate.WRITE),
    client.Mute: Route(relationships.turned("mute", on=True), Access.USER, Rate.WRITE),
    client.Unmute: Route(relationships.turned("mute", on=False), Access.USER, Rate.WRITE),
    client.SetSwitches: Route(relationships.set_switches, Access.USER, Rate.WRITE),
    client.ListRelationships: Route(relationships.list_relationships, Access.USER, Rate.READ),
}
"""Every client frame but `authenticate`, which comes before there is anyone to ask for the others."""
