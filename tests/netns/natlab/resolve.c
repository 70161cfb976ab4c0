/* What the C library's resolver says: `resolve NAME…` prints "NAME: address address" or "NAME: the error", an address
 * is asked for its name. Built against glibc and against musl. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

static void by_address(const char *text)
{
	struct sockaddr_in at = {.sin_family = AF_INET};
	char name[1025];
	inet_pton(AF_INET, text, &at.sin_addr);
	int error = getnameinfo((struct sockaddr *)&at, sizeof at, name, sizeof name, NULL, 0, NI_NAMEREQD);
	printf("%s: %s\n", text, error ? "none" : name);
}

static void by_name(const char *name)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list = NULL;
	int error = getaddrinfo(name, NULL, &hints, &list);
	printf("%s:", name);
	if (error)
		printf(" %s", error == EAI_NONAME ? "none" : error == EAI_AGAIN ? "again" : gai_strerror(error));
	for (struct addrinfo *one = list; one && !error; one = one->ai_next) {
		char text[INET6_ADDRSTRLEN] = "";
		const void *at = one->ai_family == AF_INET ? (const void *)&((struct sockaddr_in *)one->ai_addr)->sin_addr
		                                           : (const void *)&((struct sockaddr_in6 *)one->ai_addr)->sin6_addr;
		inet_ntop(one->ai_family, at, text, sizeof text);
		printf(" %s", text);
	}
	printf("\n");
}

int main(int argc, char **argv)
{
	struct in_addr any;
	for (int i = 1; i < argc; i++)
		(inet_pton(AF_INET, argv[i], &any) == 1 ? by_address : by_name)(argv[i]);
	return 0;
}
