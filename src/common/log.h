/*-------------------------------------------------------------------------
 *
 * log.h
 *		Structured lines on stderr: time, level, message, then key=value pairs.
 *
 *-------------------------------------------------------------------------
 */
#ifndef COMMON_LOG_H
#define COMMON_LOG_H

typedef enum LogLevel
{
	LOG_LEVEL_DEBUG,
	LOG_LEVEL_INFO,
	LOG_LEVEL_WARNING,
	LOG_LEVEL_ERROR
} LogLevel;

/* The level of that name, or -1. */
extern int log_level_find(const char *name);

/* Lines below this level are left out. */
extern void log_set_level(LogLevel level);

/*
 * Write a line: a message, then pairs of char * key and value up to a NULL key;
 * a NULL value leaves its pair out.  Values are quoted and escaped where they
 * need it, so that nothing a client sends can forge a line.
 */
extern void log_line(LogLevel level, const char *message, ...) __attribute__((sentinel));

/* "abcd...wxyz" for a token, in a static buffer; never more of it than that. */
extern const char *log_token(const char *token);

#endif /* COMMON_LOG_H */
