// Stop on request. SIGTERM, SIGINT and SIGUSR1 set a flag; loops read it at safe points,
// save, and throw StoppedError, which launch/ turns into exit code 75. A second signal
// changes nothing: the save under way is always finished.
#pragma once

namespace routecast {

void InstallStopHandlers();  // once, at the start of main
bool StopRequested();        // async-signal-safe flag; any thread
// StoppedError "stopped WHAT: start the same command again" where a stop was requested.
// For what reads, and has nothing to save.
void ThrowIfStopped(const char* what);
void RequestStop();  // what the handler does; for tests and limits such as --max_hours

}  // namespace routecast
