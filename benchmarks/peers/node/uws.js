// A broadcast in C++, the upper bound of WebSocket throughput: each frame goes to everyone unchanged, and is not stored.
// node uws.js PORT
const uWS = require('@trufflesuite/uws-js-unofficial')

const app = uWS.App()
app.ws('/*', {
  compression: uWS.DISABLED,
  idleTimeout: 960,
  maxBackpressure: 64 * 1024 * 1024,
  open: (socket) => {
    socket.subscribe('room')
    socket.send('{"type":"ready"}')
  },
  message: (_, message) => app.publish('room', message),
})
app.listen('127.0.0.1', Number(process.argv[2]), () => {})
