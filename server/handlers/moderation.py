"""Moderation: hide and show messages, reports, and the audit log."""

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId
from protocol.roles import Act
from protocol.server import AuditPage, Changed, Done, ReportPage
from server.context import Context
from server.core.errors import NotActive, NotFound
from server.db.database import Db
from server.domain.membership import taking_part
from server.domain.permissions import require, require_not_above, require_sender_not_above
from server.domain.publish import publish_changed
from server.queries import audit, bounds, conversations, edits, messages, moderation, users
from server.queries.audit import Deed
from server.queries.messages import FoundMessage


async def moderate(context: Context, frame: client.Moderate) -> Changed:
    """Hide a message from all users except its sender and moderators. Uphold its reports."""
    async with context.transaction() as db:
        found = await _moderated(db, context, frame)
        before = message = found.message
        is_new = not (before.is_moderated and before.moderation_reason == frame.reason)
        if is_new:
            message = await moderation.moderate(db, before, context.user_id, frame.reason)
            deed = Deed(context.user_id, "moderate", before.sender_id, before.id, {"reason": frame.reason})
            await audit.record(db, before.conversation_id, deed)
    answer = Changed(conversation_id=before.conversation_id, version=message.version)
    if is_new:
        publish_changed(context.events, found, message)
    is_more_due = True
    while is_more_due:
        async with context.transaction() as db:
            is_more_due = await moderation.uphold(db, message, context.user_id)
            # Checked last, as in `list_reports`. The message is hidden already, and the caller may have lost the role
            # since.
            await _require(db, context, before.conversation_id, Act.MODERATE)
    return answer


async def unmoderate(context: Context, frame: client.Unmoderate) -> Changed:
    """Show a hidden message again."""
    async with context.transaction() as db:
        there = await messages.find(db, frame, context.user_id)
        known = await edits.words(db, frame) if there is not None and there.message.is_moderated else None
        found = await _moderated(db, context, frame)
        before = found.message
        if not before.is_moderated:
            return Changed(conversation_id=before.conversation_id, version=before.version)
        is_same = known is not None and known.version == before.version
        message = await moderation.unmoderate(db, before, words=known.words if known is not None and is_same else None)
        deed = Deed(context.user_id, "unmoderate", before.sender_id, before.id)
        await audit.record(db, before.conversation_id, deed)
    return publish_changed(context.events, found, message)


async def report(context: Context, frame: client.ReportMessage) -> Done:
    """Report a message to the moderators."""
    async with context.transaction() as db:
        found = await messages.lock(db, frame, context.user_id)
        if found is None or found.message.is_deleted:
            raise NotFound("message_id")
        if found.message.sender_id == context.user_id:
            raise Refused(
                ErrorCode.FORBIDDEN, "You cannot report your own message. Delete it instead.", path="message_id"
            )
        if not await users.lock(db, [context.user_id]):
            raise NotActive
        await moderation.report(db, frame, context.user_id)
        await bounds.require_reports(db, context.user_id)
    return Done()


async def list_reports(context: Context, frame: client.ListReports) -> ReportPage:
    """Return a page of reports."""
    async with context.database.connection() as db:
        found = await moderation.reports(db, frame, context.user_id, limit=frame.limit)
        # Checked last, so that a caller who may read now may read all of the result.
        await _require(db, context, frame.conversation_id, Act.MODERATE)
    page = await found.decoded()
    return ReportPage(reports=page.rows, after=page.after)


async def dismiss_report(context: Context, frame: client.DismissReport) -> Done:
    """Dismiss a report."""
    async with context.transaction() as db:
        if await conversations.lock_as(db, frame.conversation_id, context.user_id) is None:
            raise NotFound("conversation_id")
        me = await taking_part(db, frame.conversation_id, context.user_id)
        require(me, Act.MODERATE)
        about = await moderation.reported(db, frame, context.user_id)
        if about is None:
            raise NotFound("report_id")
        if about.sender_id is not None:
            await require_not_above(db, me, about.sender_id, "report_id")
        if await moderation.dismiss(db, frame, context.user_id):
            deed = Deed(context.user_id, "dismiss_report", None, about.message_id, {"report_id": frame.report_id})
            await audit.record(db, frame.conversation_id, deed)
    return Done()


async def list_audit(context: Context, frame: client.ListAudit) -> AuditPage:
    """Return a page of the audit log."""
    chain = frame.conversation_id or audit.SERVER
    async with context.database.connection() as db:
        found = await audit.page(db, chain, frame.after, limit=frame.limit, reader=context.user_id)
        # Checked last, as in `list_reports`.
        await _require(db, context, frame.conversation_id, Act.READ_AUDIT)
    page = await found.decoded()
    return AuditPage(entries=page.rows, after=page.after)


async def _require(db: Db, context: Context, conversation_id: ConversationId | None, act: Act) -> None:
    """Raise Refused unless the caller may do something in a conversation, or on the server if that is None."""
    if conversation_id is None:
        if not await users.is_admin(db, context.user_id):
            raise Refused(ErrorCode.FORBIDDEN, "Only server administrators may leave out `conversation_id`. Give it.",
                          path="conversation_id")  # fmt: skip
        return
    require(await taking_part(db, conversation_id, context.user_id), act)


async def _moderated(db: Db, context: Context, frame: client.Moderate | client.Unmoderate) -> FoundMessage:
    found = await messages.lock(db, frame, context.user_id)
    if found is None:
        raise NotFound("message_id")
    require(found.me, Act.MODERATE)
    if found.message.is_deleted:
        raise NotFound("message_id")
    if found.message.system_message_type is not None:
        raise Refused(
            ErrorCode.FORBIDDEN, "System messages cannot be moderated. Choose a message of a user.", path="message_id"
        )
    if found.message.sender_id == context.user_id:
        raise Refused(ErrorCode.FORBIDDEN, "You cannot moderate your own message. Delete it instead.",
                      path="message_id")  # fmt: skip
    await require_sender_not_above(db, found.me, found.message)
    return found
