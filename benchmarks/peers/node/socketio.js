// The same chat on socket.io with its Redis adapter: one insert per message, and a room per conversation.
// Clients may ask for no acknowledgement. A message is stored before it is sent to the room, in either case.
// node socketio.js PORT DATABASE_URL REDIS_URL WORKERS
const cluster = require('node:cluster')
const [port, database, redis, workers] = process.argv.slice(2)

async function main() {
  const { Server } = require('socket.io')
  const { createAdapter } = require('@socket.io/redis-adapter')
  const Redis = require('ioredis')
  const { Pool } = require('pg')

  const pool = new Pool({ connectionString: database, max: 8 })
  const publisher = new Redis(redis.startsWith('unix://') ? redis.slice(7) : redis)
  const subscriber = publisher.duplicate()
  const io = new Server(Number(port), {
    transports: ['websocket'],
    serveClient: false,
    adapter: createAdapter(publisher, subscriber),
  })

  io.use(async (socket, next) => {
    const { rows } = await pool.query({
      name: 'session',
      text: 'SELECT user_id FROM session WHERE token = $1 AND expires_at > now()',
      values: [socket.handshake.auth.token],
    })
    socket.data.user = rows[0]?.user_id
    next(rows.length ? undefined : new Error('log in first'))
  })

  io.on('connection', async (socket) => {
    socket.on('send', async (message, answer) => {
      if (!socket.rooms.has(message.conversation_id)) return answer?.({ code: 'not_found' })
      const { rows } = await pool.query({
        name: 'send',
        text: 'INSERT INTO message (id, conversation_id, sender_id, content) VALUES ($1, $2, $3, $4) RETURNING created_at',
        values: [message.message_id, message.conversation_id, socket.data.user, message.content],
      })
      const sent = { id: message.message_id, conversation_id: message.conversation_id, sender_id: socket.data.user }
      io.to(message.conversation_id).emit('message_sent', {
        ...sent,
        content: message.content,
        created_at: rows[0].created_at,
      })
      answer?.({ created_at: rows[0].created_at })
    })
    const { rows } = await pool.query({
      name: 'rooms',
      text: 'SELECT conversation_id FROM participant WHERE user_id = $1',
      values: [socket.data.user],
    })
    socket.join(rows.map((row) => row.conversation_id))
    socket.emit('ready')
  })
}

if (cluster.isPrimary && Number(workers) > 1) {
  for (let count = 0; count < Number(workers); count++) cluster.fork()
} else {
  main()
}
